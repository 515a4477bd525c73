using System.Numerics;
using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Machine;

internal enum WarpState : byte
{
    Ready, AtBarrier, Done,
}

/// <summary>
/// 32 lanes in lockstep. Lanes that went different ways are kept as groups (place, mask): the
/// lowest place runs first and groups at one place merge, which reconverges compiler-made code. An
/// instruction that needs lanes of other groups blocks its group until they arrive; when every
/// group is blocked the warp can never go on, and the fault names both places.
/// </summary>
internal sealed unsafe class Warp
{
    private const int Quantum = 4096;

    private readonly int[] _pcs = new int[32];
    private readonly uint[] _masks = new uint[32];
    private readonly bool[] _blocked = new bool[32];
    private int _groups, _current, _bytes;
    private long _steps;

    public Warp(Block block, int index)
    {
        (Block, Index) = (block, index);
        Addresses = (ulong*)NativeMemory.AlignedAlloc(32 * 8, 64);
        Staging = (byte*)NativeMemory.AlignedAlloc(32 * 16, 64);
    }

    public Block Block { get; }
    public int Index { get; }

    /// <summary>The register file.</summary>
    public byte* R { get; private set; }

    /// <summary>Lanes that execute the current instruction.</summary>
    public uint Exec { get; private set; }

    /// <summary>Lanes that exist and have not returned.</summary>
    public uint Alive { get; private set; }
    public WarpState State { get; private set; }
    public int BarrierId { get; set; }
    public int BarrierThreads { get; set; }

    /// <summary>Scratch: 32 addresses, and 32 lanes of up to 16 bytes.</summary>
    public ulong* Addresses { get; }
    public byte* Staging { get; }

    /// <summary>Local memory, one run of bytes per lane.</summary>
    public byte* Local { get; private set; }
    public byte* LocalState { get; private set; }
    public Memory.AsyncCopies Copies { get; } = new();
    public int Pc { get; private set; }
    public LaunchCounters Counters => Block.Counters;

    public void Prepare(Program program, int threads)
    {
        if (_bytes < program.Initial.Length)
        {
            NativeMemory.AlignedFree(R);
            R = (byte*)NativeMemory.AlignedAlloc((nuint)program.Initial.Length, 64);
            _bytes = program.Initial.Length;
        }
        int local = program.LocalBytes * 32;
        if (local > 0)
        {
            Local = (byte*)NativeMemory.Realloc(Local, (nuint)local);
            LocalState = (byte*)NativeMemory.Realloc(LocalState, (nuint)local);
        }
        Alive = threads >= 32 ? uint.MaxValue : (1u << threads) - 1;
    }

    /// <summary>Puts the warp at the kernel's start with its own special registers.</summary>
    public void Start(Program program)
    {
        program.Initial.AsSpan().CopyTo(new Span<byte>(R, program.Initial.Length));
        foreach (var (name, row) in program.Specials) SpecialRegisters.Fill(this, name, row);
        if (program.LocalBytes > 0)
            NativeMemory.Clear(LocalState, (nuint)program.LocalBytes * 32);
        _groups = 1;
        _current = 0;
        _pcs[0] = 0;
        _masks[0] = Alive;
        _blocked[0] = false;
        _steps = 0;
        State = WarpState.Ready;
        Copies.Clear();
    }

    public void Release() => State = WarpState.Ready;

    /// <summary>Frees the native memory; the warp cannot run again.</summary>
    public void Free()
    {
        NativeMemory.AlignedFree(R);
        NativeMemory.AlignedFree(Addresses);
        NativeMemory.AlignedFree(Staging);
        NativeMemory.Free(Local);
        NativeMemory.Free(LocalState);
    }

    /// <summary>Runs to a barrier, to the end, or for one share of time.</summary>
    public void Run()
    {
        var code = Block.Program.Code;
        long[] issued = Block.Issued, lanes = Block.Lanes;
        byte* r = R;
        int pc = _pcs[_current];
        uint mask = _masks[_current];
        int quantum = Block.Quantum > 0 ? Block.Quantum : Quantum;
        while (true)
        {
            var i = code[pc];
            uint exec = mask;
            if (i.Guard >= 0) exec &= *(uint*)(r + i.Guard) ^ i.GuardFlip;
            Pc = pc;
            issued[pc]++;
            // A branch is executed by all who are here; its guard only says who takes it.
            lanes[pc] += BitOperations.PopCount(i.Flow == Flow.Branch ? mask : exec);
            if (i.Flow == Flow.Plain)
            {
                if (exec != 0)
                {
                    Exec = exec;
                    i.Run(this, i);
                }
                pc++;
            }
            else
            {
                (_pcs[_current], _masks[_current]) = (pc, mask);
                Exec = exec;
                if (!Step(i, exec, ref quantum)) return;
                pc = _pcs[_current];
                mask = _masks[_current];
                continue;
            }
            if (_groups > 1)
            {
                _pcs[_current] = pc;
                if (MustSwitch(pc))
                {
                    _masks[_current] = mask;
                    Reschedule();
                    pc = _pcs[_current];
                    mask = _masks[_current];
                }
            }
        }
    }

    // One instruction that may change which lanes run, or stop the warp. False: leave Run.
    private bool Step(Instruction i, uint exec, ref int quantum)
    {
        switch (i.Flow)
        {
            case Flow.Branch:
                Branch(i, exec);
                break;
            case Flow.Exit:
                Leave(exec);
                if (_groups == 0)
                {
                    State = WarpState.Done;
                    return false;
                }
                break;
            case Flow.Sync:
                uint needed = Collectives.Members(this, i, exec) & Alive;
                if (exec != 0 && (exec & needed) != needed)
                {
                    Wait($"needs lanes 0x{needed:x8}");
                    return true;
                }
                if (exec != 0) i.Run(this, i);
                _pcs[_current]++;
                break;
            case Flow.Barrier:
                if (exec == 0)
                {
                    _pcs[_current]++;
                    break;
                }
                if (exec != Alive)
                {
                    Wait("is a barrier for the whole warp");
                    return true;
                }
                i.Run(this, i);
                _pcs[_current]++;
                if (i.Mode2 == 1) break; // bar.arrive does not wait
                State = WarpState.AtBarrier;
                return false;
        }
        if (_groups > 1 && MustSwitch(_pcs[_current])) Reschedule();
        _steps++;
        if (i.Flow != Flow.Branch || --quantum > 0) return true;
        if (_steps > Block.Options.WarpSteps)
            throw Fault(Check.Endless, -1, $"the warp has taken {_steps} branches and goes on");
        return false;
    }

    private void Branch(Instruction i, uint taken)
    {
        uint mask = _masks[_current], stay = mask & ~taken;
        if (stay == 0) _pcs[_current] = i.Target;
        else if (taken == 0) _pcs[_current]++;
        else
        {
            Counters.DivergentBranches++;
            _masks[_current] = stay;
            _pcs[_current]++;
            (_pcs[_groups], _masks[_groups], _blocked[_groups]) = (i.Target, taken, false);
            _groups++;
            Reschedule();
        }
    }

    private void Leave(uint leaving)
    {
        Alive &= ~leaving;
        _masks[_current] &= ~leaving;
        if (_masks[_current] != 0)
        {
            _pcs[_current]++;
            return;
        }
        RemoveCurrent();
        // Lanes that have returned no longer keep the others waiting.
        for (int g = 0; g < _groups; g++) _blocked[g] = false;
        if (_groups > 0) Reschedule();
    }

    private void RemoveCurrent()
    {
        _groups--;
        (_pcs[_current], _masks[_current], _blocked[_current]) =
            (_pcs[_groups], _masks[_groups], _blocked[_groups]);
        _current = 0;
    }

    private void Wait(string why)
    {
        _blocked[_current] = true;
        for (int g = 0; g < _groups; g++)
        {
            if (_blocked[g]) continue;
            Reschedule();
            return;
        }
        var here = Block.Program.Code[_pcs[_current]];
        bool barrier = here.Flow == Flow.Barrier;
        string others =
            string.Join("; ", Enumerable.Range(0, _groups).Where(g => g != _current).Select(g =>
            $"lanes 0x{_masks[g]:x8} wait at {Block.Program.Code[_pcs[g]].Source.Source}: " +
            Block.Program.Code[_pcs[g]].Source.Text));
        barrier |= Enumerable.Range(0, _groups)
            .Any(g => Block.Program.Code[_pcs[g]].Flow == Flow.Barrier);
        if (others.Length == 0) others = "no other lanes can come";
        throw Fault(barrier ? Check.BarrierDivergence : Check.Deadlock,
            BitOperations.TrailingZeroCount(_masks[_current]),
            $"lanes 0x{_masks[_current]:x8} are here and the instruction {why}; {others}");
    }

    private bool MustSwitch(int pc)
    {
        for (int g = 0; g < _groups; g++)
            if (g != _current && (_pcs[g] == pc || (_pcs[g] < pc && !_blocked[g]))) return true;
        return _blocked[_current];
    }

    // Merges groups at one place, then picks the lowest that can run.
    private void Reschedule()
    {
        for (int a = 0; a < _groups; a++)
        {
            for (int b = _groups - 1; b > a; b--)
            {
                if (_pcs[b] != _pcs[a]) continue;
                _masks[a] |= _masks[b];
                _blocked[a] = false;
                _groups--;
                (_pcs[b], _masks[b], _blocked[b]) =
                    (_pcs[_groups], _masks[_groups], _blocked[_groups]);
            }
        }
        _current = -1;
        for (int g = 0; g < _groups; g++)
            if (!_blocked[g] && (_current < 0 || _pcs[g] < _pcs[_current])) _current = g;
    }

    /// <summary>A fault of the instruction being executed.</summary>
    public FaultException Fault(Check check, int lane, string detail)
    {
        var source = Block.Program.Code[Pc].Source;
        return new(new(check, detail, Block.Program.Kernel.Name, source.Source,
            Block.Place, Index, lane, source.Text));
    }
}
