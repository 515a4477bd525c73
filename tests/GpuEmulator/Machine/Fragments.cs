using MiniCpmNative.GpuEmulator.Alu;
using MiniCpmNative.GpuEmulator.Ptx;
using unsafe Handler = delegate*<MiniCpmNative.GpuEmulator.Machine.Warp,
    MiniCpmNative.GpuEmulator.Machine.Instruction, void>;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>
/// What an instruction does to registers that wgmma uses: numbers of those it reads and writes. A
/// move from register to register only renames (compilers leave such moves between products, and
/// the assembler removes them): it hands on what is known of the register it copies.
/// </summary>
internal sealed unsafe class FragmentUse
{
    public int[] Reads = [], Writes = [];

    /// <summary>A move: from that register, or (Reads empty) of a constant.</summary>
    public bool Renames;

    /// <summary>What the instruction does.</summary>
    public Handler Inner;
}

/// <summary>
/// Registers of one warp that wgmma reads and writes behind its back: none may be touched between
/// the product and its wait_group, nor after the last wgmma.fence before a product uses it.
/// </summary>
internal sealed class Fragments(int count)
{
    // Per register: fences before its last access; the group of products that writes it, and reads
    // it.
    private readonly int[] _accessed = new int[count], _writing = new int[count],
        _reading = new int[count];
    private int _fences, _complete;

    /// <summary>Groups committed, from 1 on: the number of the group that is open.</summary>
    public int Open { get; private set; } = 1;
    public bool HasOpen { get; private set; }

    public void Clear()
    {
        Array.Clear(_accessed);
        Array.Clear(_writing);
        Array.Clear(_reading);
        (_fences, _complete, Open, HasOpen) = (0, 0, 1, false);
    }

    public void Fence() => _fences++;

    public void Commit()
    {
        Open++;
        HasOpen = false;
    }

    /// <summary>wait_group: all but the latest groups are complete; the number of the last that
    /// is.</summary>
    public int Complete(int pending) => _complete = Math.Max(_complete, Open - 1 - pending);

    /// <summary>wgmma takes its registers; D's may still be written by an earlier
    /// product.</summary>
    public void Issue(Warp w, FragmentUse use)
    {
        if (_fences == 0)
            throw w.Fault(Check.WarpgroupOrder, 0, "no wgmma.fence stands before the first wgmma");
        foreach (int r in use.Writes)
        {
            CheckFence(w, r, "D");
            if (_reading[r] > _complete)
                throw w.Fault(Check.WarpgroupOrder, 0,
                    "a register of D is still read by an earlier wgmma");
            _writing[r] = Open;
        }
        foreach (int r in use.Reads)
        {
            CheckFence(w, r, "A");
            if (_writing[r] > _complete)
                throw w.Fault(Check.WarpgroupOrder, 0,
                    "a register of A is still written by an earlier wgmma: wgmma.wait_group first");
            _reading[r] = Open;
        }
        HasOpen = true;
    }

    private void CheckFence(Warp w, int register, string operand)
    {
        if (_accessed[register] > _fences)
            throw w.Fault(Check.WarpgroupOrder, 0,
                $"a register of {operand} was used since the last wgmma.fence");
    }

    /// <summary>Any other instruction.</summary>
    public static unsafe void Run(Warp w, Instruction i)
    {
        w.Fragments!.Use(w, i.Use!);
        i.Use!.Inner(w, i);
    }

    private void Use(Warp w, FragmentUse use)
    {
        if (use.Renames)
        {
            int to = use.Writes[0], from = use.Reads.Length > 0 ? use.Reads[0] : -1;
            _accessed[to] = from < 0 ? 0 : _accessed[from];
            _writing[to] = from < 0 ? 0 : _writing[from];
            _reading[to] = 0;
            return;
        }
        foreach (int r in use.Reads)
        {
            if (_writing[r] > _complete) throw InFlight(w, "reads", "writes");
            _accessed[r] = _fences + 1;
        }
        foreach (int r in use.Writes)
        {
            if (_writing[r] > _complete) throw InFlight(w, "writes", "writes");
            if (_reading[r] > _complete) throw InFlight(w, "writes", "reads");
            _accessed[r] = _fences + 1;
        }
    }

    private static FaultException InFlight(Warp w, string what, string how) =>
        w.Fault(Check.WarpgroupOrder, 0,
            $"it {what} a register that wgmma still {how}: wgmma.wait_group first");

    /// <summary>Finds the registers that a kernel's products use, and what uses them.</summary>
    /// <returns>How many there are.</returns>
    public static unsafe int Assign(IReadOnlyList<Instruction> code)
    {
        var numbers = new Dictionary<int, int>();
        foreach (var i in code)
            if (IsProduct(i))
                foreach (var register in Registers(i.Source.Operands.Take(2)))
                    if (register.Width == 4) Add(register);
        if (numbers.Count == 0) return 0;
        // Moves spread the set to both sides, until nothing more is found.
        var moves = code.Where(IsMove).ToList();
        for (int before = 0; before != numbers.Count;)
        {
            before = numbers.Count;
            foreach (var i in moves)
            {
                var (d, a) = (i.Source.Operands[0].Register!, i.Source.Operands[1].Register!);
                if (numbers.ContainsKey(d.Index)) Add(a);
                else if (numbers.ContainsKey(a.Index)) Add(d);
            }
        }
        foreach (var i in code) Note(i);
        return numbers.Count;

        void Add(PtxRegister register) => numbers.TryAdd(register.Index, numbers.Count);

        void Note(Instruction i)
        {
            var operands = i.Source.Operands;
            if (operands.Length == 0 || i.Run == null) return;
            bool writes = operands[0].Kind is not OperandKind.Address;
            int[] written = writes ? Known(operands.Take(1)) : [],
                read = Known(operands.Skip(writes ? 1 : 0));
            if (written.Length + read.Length == 0) return;
            i.Use = new()
            {
                Writes = written,
                Reads = read,
                Renames = written.Length == 1 && i.Source.Opcode.StartsWith("mov.",
                    StringComparison.Ordinal) && (IsMove(i)
                    || operands[1].Kind == OperandKind.Immediate),
                Inner = i.Run,
            };
            if (!IsProduct(i)) i.Run = &Run;
        }

        int[] Known(IEnumerable<PtxOperand> operands) => [.. Registers(operands)
            .Where(r => numbers.ContainsKey(r.Index)).Select(r => numbers[r.Index])];
    }

    private static bool IsProduct(Instruction i) =>
        i.Source.Opcode.StartsWith("wgmma.mma_async", StringComparison.Ordinal);

    private static bool IsMove(Instruction i) =>
        i.Source.Opcode is "mov.b32" or "mov.f32" or "mov.u32" or "mov.s32"
        && i.Source.Operands is [{ Kind: OperandKind.Register }, { Kind: OperandKind.Register }]
        && i.Guard < 0;

    private static IEnumerable<PtxRegister> Registers(IEnumerable<PtxOperand> operands) =>
        operands.SelectMany(o => o.Elements.Append(o)).Select(o => o.Register)
            .OfType<PtxRegister>();
}
