using System.Runtime.InteropServices;
using MiniCpmNative.GpuEmulator.Memory;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// Turns a kernel's PTX into a <see cref="Program"/>: gives every register, constant and special
/// register its row, every variable its address, every instruction its handler. What it does not
/// know it refuses here, with the PTX line, and never when the kernel runs.
/// </summary>
internal sealed unsafe partial class Assembler
{
    private readonly PtxKernel _kernel;
    private readonly Func<PtxVariable, ulong> _moduleAddress;
    private readonly Dictionary<int, int> _rows = [];
    private readonly Dictionary<(ulong Bits, int Width), int> _constants = [];
    private readonly Dictionary<string, int> _specials = [];
    private readonly Dictionary<PtxVariable, ulong> _places =
        new(ReferenceEqualityComparer.Instance);
    private int _bytes, _nextPredicate, _static, _local;

    private Assembler(PtxKernel kernel, Func<PtxVariable, ulong> moduleAddress)
    {
        (_kernel, _moduleAddress) = (kernel, moduleAddress);
        int predicates = kernel.Registers.Count(r => r.Width == 0);
        _bytes = (predicates * 4 + 63) / 64 * 64;
    }

    /// <param name="kernel">The parsed kernel.</param>
    /// <param name="moduleAddress">Device address of a .global or .const variable.</param>
    /// <exception cref="PtxException">Names the PTX line and what is not known about
    /// it.</exception>
    public static Program Assemble(PtxKernel kernel, Func<PtxVariable, ulong> moduleAddress)
    {
        var assembler = new Assembler(kernel, moduleAddress);
        assembler.PlaceVariables();
        var code = new List<Instruction>(kernel.Instructions.Count + 1);
        foreach (var source in kernel.Instructions)
        {
            var instruction = new Instruction(source);
            try
            {
                assembler.Build(instruction, source);
            }
            catch (Exception e) when (e is PtxException or IndexOutOfRangeException
                or OverflowException)
            {
                // An index beyond the operands: one is missing.
                string what = e is PtxException ? e.Message : "its operands are not those expected";
                throw new PtxException(
                    $"PTX line {source.Line}, kernel {kernel.Name}: {what}: {source.Text}");
            }
            code.Add(instruction);
        }
        code.Add(new(new("ret", [], null, false, 0, default, "ret")) { Flow = Flow.Exit });
        return new(kernel)
        {
            Code = [.. code],
            Initial = assembler.InitialRows(),
            Specials = [.. assembler._specials.Select(s => (s.Key, s.Value))],
            StaticShared = assembler._static,
            LocalBytes = (assembler._local + 15) / 16 * 16,
            FragmentRegisters = Fragments.Assign(code),
        };
    }

    private void Build(Instruction i, PtxInstruction p)
    {
        if (p.Guard != null)
        {
            i.Guard = Row(p.Guard);
            i.GuardFlip = p.GuardNegated ? ~0u : 0;
        }
        var op = new Opcode(p.Opcode);
        if (!BuildControl(i, p, op) && !BuildMemory(i, p, op) && !BuildArithmetic(i, p, op)
            && !BuildBits(i, p, op) && !BuildCollective(i, p, op))
            throw new PtxException($"instruction \"{p.Opcode}\" is not known");
        op.Finish();
    }

    // Static shared memory first, the dynamic part behind it, at its own alignment.
    private void PlaceVariables()
    {
        var used = _kernel.Instructions.SelectMany(i => i.Operands)
            .SelectMany(o => o.Elements.Append(o))
            .Select(o => o.Variable).OfType<PtxVariable>().Concat(_kernel.Variables)
            .Distinct(ReferenceEqualityComparer.Instance).Cast<PtxVariable>().ToList();
        foreach (var v in used)
        {
            if (v.Space == Space.Shared && !v.Extern)
            {
                _static = Align(_static, v.Align);
                _places[v] = (ulong)(SharedMemory.First + _static);
                _static += v.Bytes;
            }
            else if (v.Space == Space.Local)
            {
                _local = Align(_local, v.Align);
                _places[v] = (ulong)_local;
                _local += v.Bytes;
            }
        }
        var dynamic = used.Where(v => v.Space == Space.Shared && v.Extern).ToList();
        if (dynamic.Count > 0)
            _static = Align(_static, Math.Max(16, dynamic.Max(v => v.Align)));
        foreach (var v in dynamic)
            _places[v] = (ulong)(SharedMemory.First + _static);
    }

    private static int Align(int at, int to) => (at + to - 1) / to * to;

    private ulong AddressOf(PtxVariable v) => _places.TryGetValue(v, out ulong at) ? at
        : _moduleAddress(v);

    private byte[] InitialRows()
    {
        var initial = new byte[_bytes];
        initial.AsSpan().Fill(0xFF);
        foreach (var ((bits, width), row) in _constants)
        {
            if (width == 8) MemoryMarshal.Cast<byte, ulong>(initial.AsSpan(row, 256)).Fill(bits);
            else if (width == 4)
                MemoryMarshal.Cast<byte, uint>(initial.AsSpan(row, 128)).Fill((uint)bits);
        }
        return initial;
    }

    private int NewRow(int width)
    {
        int row = _bytes;
        _bytes += width * 32;
        return row;
    }

    /// <summary>Row of a register of any width.</summary>
    private int Row(PtxRegister register)
    {
        if (_rows.TryGetValue(register.Index, out int row)) return row;
        if (register.Width == 0)
        {
            row = _nextPredicate;
            _nextPredicate += 4;
        }
        else row = NewRow(register.Width);
        return _rows[register.Index] = row;
    }

    /// <summary>A constant's row.</summary>
    private int Constant(ulong bits, int width)
    {
        if (width == 4) bits = (uint)bits;
        if (_constants.TryGetValue((bits, width), out int row)) return row;
        return _constants[(bits, width)] = NewRow(width);
    }

    /// <summary>Row of a source or result of that many bytes per lane (4 stands for narrower ones
    /// too).</summary>
    private int Row(PtxOperand o, int width, bool isFloat = false)
    {
        switch (o.Kind)
        {
            case OperandKind.Register when o.Register!.Width == width: return Row(o.Register);
            case OperandKind.Register:
                throw new PtxException($"{o.Text} is .{o.Register!.Type}, expected {width} bytes");
            case OperandKind.Immediate:
                ulong bits = Literal.Bits(o.Text, width, isFloat)
                    ?? throw new PtxException($"\"{o.Text}\" is not a number");
                if (o.Negated) bits = 0 - bits;
                return Constant(bits, width);
            case OperandKind.Special when width == 4 && SpecialRegisters.IsKnown(o.Text):
                if (!_specials.TryGetValue(o.Text, out int special))
                    _specials[o.Text] = special = NewRow(4);
                return special;
            case OperandKind.Symbol when o.Text == "WARP_SZ": return Constant(32, width);
            case OperandKind.Symbol when o.Variable != null:
                return Constant(AddressOf(o.Variable) + (ulong)o.Offset, width);
            case OperandKind.Symbol when o.Parameter != null:
                return Constant((ulong)(o.Parameter.Offset + o.Offset), width);
            default: throw new PtxException($"operand {o.Text} is not known");
        }
    }

    private int Result(PtxOperand o, int width)
    {
        if (o.Kind == OperandKind.Sink) return -1;
        if (o.Kind != OperandKind.Register)
            throw new PtxException($"{o.Text} cannot take a result");
        return Row(o, width);
    }

    private int Predicate(PtxOperand o, out uint flip)
    {
        flip = o.Negated ? ~0u : 0;
        if (o.Kind == OperandKind.Sink) return -1;
        if (o.Kind == OperandKind.Immediate)
        {
            flip = o.Text == "0" ? 0 : ~0u;
            return ZeroPredicate();
        }
        if (o.Kind != OperandKind.Register || o.Register!.Width != 0)
            throw new PtxException($"{o.Text} is no predicate");
        return Row(o.Register);
    }

    // A predicate that is false in all lanes: a constant row of zeros serves.
    private int ZeroPredicate() => Constant(0, 4);

    /// <summary>An operand that must be a literal.</summary>
    private static int Number(PtxOperand o) =>
        o.Kind == OperandKind.Immediate && Literal.Bits(o.Text, 4, false) is { } value and < 1 << 16
            ? (int)value
            : throw new PtxException($"expected a number, got {o.Text}");

    private static void Operands(PtxInstruction p, int count)
    {
        if (p.Operands.Length != count)
            throw new PtxException($"expected {count} operands, got {p.Operands.Length}");
    }

    private static void Operands(PtxInstruction p, int least, int most)
    {
        if (p.Operands.Length < least || p.Operands.Length > most)
            throw new PtxException($"expected {least} to {most} operands, got {p.Operands.Length}");
    }

    /// <summary>Bytes per lane of a register that holds values of the type.</summary>
    private static int Width(string type) => Math.Max(4, PtxParser.SizeOf(type));
}
