using System.Numerics;
using System.Runtime.InteropServices;

namespace MiniCpmNative.GpuEmulator.Machine;

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
    private readonly Hold[] _holds = new Hold[32];
    private int _groups, _current, _bytes, _lastLook;
    private bool _looked;
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

    /// <summary>Set by an instruction that did not get what it waits for.</summary>
    public bool Polled { get; set; }

    /// <summary>The last turn ended with a wait that failed, or looked for what others
    /// write.</summary>
    public bool Idle { get; private set; }

    /// <summary>It looks again and again for what another block writes.</summary>
    public bool IsSpinning => State == WarpState.Ready && _looked;
    public int BarrierId { get; set; }

    /// <summary>Registers of a thread, for setmaxnreg.</summary>
    public int Registers { get; set; }
    public int BarrierThreads { get; set; }

    /// <summary>Scratch: 32 addresses, and 32 lanes of up to 16 bytes.</summary>
    public ulong* Addresses { get; }
    public byte* Staging { get; }

    /// <summary>Local memory, one run of bytes per lane.</summary>
    public byte* Local { get; private set; }
    public byte* LocalState { get; private set; }
    public Memory.AsyncCopies Copies { get; } = new();
    /// <summary>Registers that wgmma uses, null without one.</summary>
    public Fragments? Fragments { get; private set; }
    public Memory.BulkCopies Bulks { get; } = new();
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
        if (program.FragmentRegisters > 0) Fragments ??= new(program.FragmentRegisters);
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
        _holds[0] = Hold.None;
        _looked = false;
        _steps = 0;
        State = WarpState.Ready;
        Copies.Clear();
        Fragments?.Clear();
        Registers = Block.StartRegisters;
        Bulks.Clear();
    }

    public void Release() => State = WarpState.Ready;

    /// <summary>Goes on behind the instruction at which the warp waited for its
    /// warpgroup.</summary>
    public void Advance()
    {
        _pcs[_current]++;
        State = WarpState.Ready;
    }

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
        Idle = false;
        WakePolled();
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
                    Bulks.End(this);
                    State = WarpState.Done;
                    return false;
                }
                break;
            case Flow.Sync:
                uint needed = Collectives.Members(this, i, exec) & Alive;
                if (exec != 0 && (exec & needed) != needed)
                {
                    return Wait($"needs lanes 0x{needed:x8}");
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
                    return Wait("is a barrier for the whole warp");
                }
                i.Run(this, i);
                _pcs[_current]++;
                if (i.Mode2 == 1) break; // bar.arrive does not wait
                State = WarpState.AtBarrier;
                return false;
            case Flow.Group:
                if (exec == 0)
                {
                    _pcs[_current]++;
                    break;
                }
                if (exec != uint.MaxValue)
                {
                    return Wait("needs all lanes");
                }
                State = WarpState.AtGroup;
                if (!Block.RunGroup(this, i)) return false;
                break;
            case Flow.Poll:
                Polled = false;
                if (exec != 0) i.Run(this, i);
                if (!i.Holds || !Polled) _pcs[_current]++;
                if (exec != 0 && i.Looks) Look(i);
                if (!Polled) break;
                _holds[_current] = Hold.Polled;
                if (TryOtherLanes()) return true;
                _holds[_current] = Hold.None;
                Idle = true;
                _steps++;
                return false;
        }
        if (_groups > 1 && MustSwitch(_pcs[_current])) Reschedule();
        _steps++;
        if (i.Flow != Flow.Branch || (--quantum > 0 && !_looked)) return true;
        if (_steps > Block.Options.WarpSteps)
            throw Fault(Check.Endless, -1, $"the warp has taken {_steps} branches and goes on");
        Idle = _looked;
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
            (_pcs[_groups], _masks[_groups], _holds[_groups]) =
                (i.Target, taken, Hold.None);
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
        Array.Clear(_holds, 0, _groups);
        if (_groups > 0) Reschedule();
    }

    private void RemoveCurrent()
    {
        _groups--;
        (_pcs[_current], _masks[_current], _holds[_current]) =
            (_pcs[_groups], _masks[_groups], _holds[_groups]);
        _current = 0;
    }

    // False: the warp's other lanes wait for other warps.
    private bool Wait(string why)
    {
        _holds[_current] = Hold.Blocked;
        if (TryOtherLanes()) return true;
        if (Array.IndexOf(_holds, Hold.Polled, 0, _groups) >= 0)
        {
            Idle = true;
            return false;
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

    // True when lanes elsewhere can go on.
    private bool TryOtherLanes()
    {
        if (Array.IndexOf(_holds, Hold.None, 0, _groups) < 0) return false;
        Reschedule();
        return true;
    }

    private void WakePolled()
    {
        if (_groups < 2) return;
        for (int g = 0; g < _groups; g++)
            if (_holds[g] == Hold.Polled) _holds[g] = Hold.None;
        Reschedule();
    }

    // A look at memory that finds what the last one found, at the same place, is a spin.
    private void Look(Instruction i)
    {
        var hash = new HashCode();
        hash.Add(Pc);
        for (uint rest = Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            hash.Add(Addresses[lane]);
            int row = i.D >= 0 || i.Rows.Length == 0 ? i.D : i.Rows[0];
            if (row >= 0) hash.Add(((uint*)(R + row))[lane * (i.DWidth / 4)]);
        }
        int seen = hash.ToHashCode();
        _looked = seen == _lastLook;
        _lastLook = seen;
    }

    private bool MustSwitch(int pc)
    {
        for (int g = 0; g < _groups; g++)
            if (g != _current && (_pcs[g] == pc || (_pcs[g] < pc && _holds[g] == Hold.None)))
                return true;
        return _holds[_current] != Hold.None;
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
                _holds[a] = Hold.None;
                _groups--;
                (_pcs[b], _masks[b], _holds[b]) =
                    (_pcs[_groups], _masks[_groups], _holds[_groups]);
            }
        }
        _current = -1;
        for (int g = 0; g < _groups; g++)
            if (_holds[g] == Hold.None && (_current < 0 || _pcs[g] < _pcs[_current])) _current = g;
    }

    /// <summary>A fault of the instruction being executed.</summary>
    public FaultException Fault(Check check, int lane, string detail)
    {
        var source = Block.Program.Code[Pc].Source;
        return new(new(check, detail, Block.Program.Kernel.Name, source.Source,
            Block.Place, Index, lane, source.Text));
    }
}
