namespace MiniCpmNative.GpuEmulator.Ptx;

/// <summary>PTX that cannot be read or holds an instruction the emulator does not know.</summary>
public sealed class PtxException(string message) : Exception(message);

/// <summary>State spaces of PTX variables and accesses.</summary>
public enum Space : byte
{
    Generic, Global, Shared, Const, Local, Param,
}

/// <summary>A register of one kernel. Width 0 is a predicate, else bytes per lane (4 or
/// 8).</summary>
public sealed record PtxRegister(string Name, string Type, int Index)
{
    public int Width { get; } = Type switch
    {
        "pred" => 0,
        "b8" or "s8" or "u8" or "b16" or "s16" or "u16" or "f16" or "bf16" => 4,
        "b32" or "s32" or "u32" or "f32" or "f16x2" or "bf16x2" => 4,
        "b64" or "s64" or "u64" or "f64" => 8,
        _ => throw new PtxException($"register type .{Type} is not known"),
    };
}

/// <summary>A variable: its place is decided when the kernel or the module is loaded.</summary>
public sealed record PtxVariable(
    string Name, Space Space, int Align, int Bytes, byte[]? Initial = null, bool Extern = false);

/// <summary>A kernel parameter and its place in the argument buffer.</summary>
public sealed record PtxParameter(string Name, string Type, int Align, int Bytes, int Offset);

public enum OperandKind : byte
{
    Register, Immediate, Symbol, Special, Address, Vector, Sink, Pair,
}

/// <summary>
/// One operand. Address: [Base + Offset], where Base is a register, a symbol or nothing.
/// Vector: {Elements}; Pair: p|q. Immediate: raw text, read by the instruction's type.
/// </summary>
public sealed record PtxOperand(OperandKind Kind, string Text)
{
    public PtxRegister? Register { get; init; }
    public PtxVariable? Variable { get; init; }
    public PtxParameter? Parameter { get; init; }
    public long Offset { get; init; }
    public bool Negated { get; init; }
    public PtxOperand[] Elements { get; init; } = [];
}

/// <summary>A source position given by .loc; the second pair is where it was inlined.</summary>
public readonly record struct SourceLine(string File, int Line, int InlinedAt)
{
    public override string ToString() => Line == 0
        ? "unknown line"
        : InlinedAt > 0 ? $"{File}:{Line} (inlined at {InlinedAt})" : $"{File}:{Line}";
}

public sealed record PtxInstruction(
    string Opcode, PtxOperand[] Operands, PtxRegister? Guard, bool GuardNegated,
    int Line, SourceLine Source, string Text);

public sealed record PtxKernel(string Name)
{
    public List<PtxParameter> Parameters { get; } = [];
    public List<PtxInstruction> Instructions { get; } = [];
    public Dictionary<string, int> Labels { get; } = [];
    public List<PtxRegister> Registers { get; } = [];
    public List<PtxVariable> Variables { get; } = [];
    public int[] MaxThreads { get; set; } = [];
    public int[] RequiredThreads { get; set; } = [];
    public int MaxRegisters { get; set; }
    public int ParameterBytes => Parameters.Count == 0 ? 0 : Parameters[^1].Offset
        + Parameters[^1].Bytes;
    public int Line { get; init; }
}

public sealed record PtxModule(string Version, string Target)
{
    public Dictionary<string, PtxKernel> Kernels { get; } = [];
    public Dictionary<string, PtxVariable> Variables { get; } = [];
}
