using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>What all blocks of one launch share.</summary>
internal sealed record Launch(
    Program Program, (int X, int Y, int Z) Grid, (int X, int Y, int Z) Size, int DynamicShared,
    byte[] Arguments, DeviceMemory Memory, EmulatorOptions Options, ulong Seed)
{
    public int Threads => Size.X * Size.Y * Size.Z;
    public long Blocks => (long)Grid.X * Grid.Y * Grid.Z;

    /// <summary>One number: how often memory was changed for other blocks to see.</summary>
    public long[] Changes { get; } = new long[1];
    public Handovers Handovers { get; } = new();
}

/// <summary>
/// One thread block at a time on one host thread: its warps take turns until they wait at a
/// barrier; when all that are left wait at the same one, it opens. One object runs many blocks, one
/// after another, and counts for all of them.
/// </summary>
internal sealed unsafe class Block : IDisposable
{
    private readonly Warp[] _warps;
    private readonly int[] _order;
    private const int Patience = 64;

    private readonly int[] _arrived = new int[16];
    private ulong _random;
    private int _fruitless, _freeRegisters;

    public Block(Launch launch)
    {
        Launch = launch;
        Counters = new(launch.Program.Kernel.Name);
        Issued = new long[launch.Program.Code.Length];
        Lanes = new long[launch.Program.Code.Length];
        int count = (launch.Threads + 31) / 32;
        _warps = new Warp[count];
        _order = new int[count];
        for (int w = 0; w < count; w++) _warps[w] = new(this, w);
        Shared = new(launch.Program.StaticShared + launch.DynamicShared, count);
        Barriers = new(Shared);
    }

    public Launch Launch { get; }
    public Program Program => Launch.Program;
    public EmulatorOptions Options => Launch.Options;
    public DeviceMemory Memory => Launch.Memory;
    public (int X, int Y, int Z) Grid => Launch.Grid;
    public (int X, int Y, int Z) Size => Launch.Size;
    public int DynamicShared => Launch.DynamicShared;
    public int WarpCount => _warps.Length;
    public ReadOnlySpan<Warp> Warps => _warps;
    public (int X, int Y, int Z) Place { get; private set; }
    public LaunchCounters Counters { get; }

    /// <summary>Per instruction: times issued, and lanes that took part.</summary>
    public long[] Issued { get; }
    public long[] Lanes { get; }
    public SharedMemory Shared { get; }
    public MemoryBarriers Barriers { get; }

    /// <summary>Bulk copies to shared memory that have not arrived.</summary>
    public List<BulkCopy> Flying { get; } = [];

    /// <summary>Counts what others may wait for: barriers opened, memory changed for
    /// them.</summary>
    public long Events { get; private set; }

    /// <summary>Stamps of the blocks whose writes are visible here.</summary>
    public HashSet<uint> Acquired { get; } = [];

    /// <summary>A fence of the device has been executed.</summary>
    public bool Fenced { get; set; }

    /// <summary>The launch's changes when the block last looked in vain.</summary>
    public long Seen { get; set; }

    /// <summary>This block's mark in <see cref="Allocation.Writers"/>.</summary>
    public uint Stamp { get; private set; }

    /// <summary>Branches of one turn; 0 is the default.</summary>
    public int Quantum { get; private set; }

    /// <summary>Puts the block of that number at the kernel's start.</summary>
    public void Begin(long index)
    {
        var grid = Launch.Grid;
        Place = ((int)(index % grid.X), (int)(index / grid.X % grid.Y),
            (int)(index / grid.X / grid.Y));
        Stamp = Launch.Memory.LaunchStamp + (uint)index;
        _random = Launch.Seed == 0 ? 0 : Launch.Seed ^ (ulong)index * 0x9E3779B97F4A7C15;
        Shared.Begin();
        Barriers.Clear();
        Flying.Clear();
        Array.Clear(_arrived);
        _fruitless = 0;
        _freeRegisters = Registers - StartRegisters * 32 * WarpCount;
        Seen = -1;
        Acquired.Clear();
        Fenced = false;
        for (int w = 0; w < _warps.Length; w++)
        {
            _order[w] = w;
            _warps[w].Prepare(Program, Math.Min(32, Launch.Threads - w * 32));
            _warps[w].Start(Program);
        }
    }

    /// <summary>Runs until all warps have returned, or (false) until they only wait for what other
    /// blocks write.</summary>
    public bool Run()
    {
        while (true)
        {
            var state = Turn();
            if (state == BlockState.Done) return true;
            if (state == BlockState.Starved) return false;
        }
    }

    /// <summary>Registers of a thread at the start: what .maxnreg says, else all that the launch
    /// bounds allow, as compilers reserve them for kernels with setmaxnreg.</summary>
    public int StartRegisters => Program.Kernel.MaxRegisters > 0
        ? Program.Kernel.MaxRegisters
        : Math.Min(255, Registers / Math.Max(Program.MaxThreads, 32 * WarpCount)) & ~7;

    private const int Registers = 64 << 10;

    /// <summary>So many more registers for each thread of a warp, when the block has
    /// them.</summary>
    public bool TryTakeRegisters(int more)
    {
        if (more * 32 > _freeRegisters) return false;
        _freeRegisters -= more * 32;
        Events++;
        return true;
    }

    /// <summary>Memory has changed that other blocks may wait for.</summary>
    public void Changed()
    {
        Events++;
        Interlocked.Increment(ref Launch.Changes[0]);
    }

    /// <summary>A warp arrives at a numbered barrier without waiting for it.</summary>
    public void Arrive(Warp warp, int barrier)
    {
        _arrived[barrier] += 32;
        Shared.Arrive(warp.Index, barrier);
    }

    /// <summary>Runs a warpgroup's instruction when the last of its four warps has come to
    /// it.</summary>
    public bool RunGroup(Warp last, Instruction i)
    {
        int first = last.Index & ~3;
        if (first + 4 > _warps.Length)
            throw last.Fault(Check.BarrierDivergence, 0,
                "a warpgroup is four warps whose first is a multiple of 4");
        for (int v = first; v < first + 4; v++)
        {
            if (_warps[v].State != WarpState.AtGroup) return false;
            if (_warps[v].Pc != last.Pc)
                throw last.Fault(Check.BarrierDivergence, 0,
                    $"warp {v} of the warpgroup is at another one: {Where(_warps[v])}");
        }
        i.Run(last, i);
        for (int v = first; v < first + 4; v++) _warps[v].Advance();
        Events++;
        return true;
    }

    private enum BlockState : byte
    {
        Running, Starved, Done,
    }

    private BlockState Turn()
    {
        bool ran = false, idle = true;
        long events = Events + Barriers.Completed;
        Shuffle();
        foreach (int w in _order)
        {
            if (_warps[w].State != WarpState.Ready) continue;
            if (_random != 0) Quantum = 1 + (int)(Next() % 64);
            _warps[w].Run();
            ran = true;
            idle &= _warps[w].Idle;
        }
        if (_random != 0 && Flying.Count > 0 && Next() % 8 == 0) DeliverOne();
        if (OpenBarriers() || (ran && (!idle || events != Events + Barriers.Completed)))
        {
            _fruitless = 0;
            return BlockState.Running;
        }
        if (Flying.Count > 0)
        {
            DeliverOne();
            return BlockState.Running;
        }
        if (ran && ++_fruitless < Patience) return BlockState.Running;
        if (Array.TrueForAll(_warps, w => w.State == WarpState.Done)) return BlockState.Done;
        if (!Array.Exists(_warps, w => w.IsSpinning)) throw Deadlock();
        _fruitless = Patience - 4;
        return BlockState.Starved;
    }

    // Copies arrive in any order; the first one without a shuffle.
    private void DeliverOne()
    {
        int n = _random == 0 ? 0 : (int)(Next() % (ulong)Flying.Count);
        var copy = Flying[n];
        Flying.RemoveAt(n);
        BulkCopies.Deliver(copy);
        _fruitless = 0;
    }

    /// <summary>Nobody can go on: what each warp waits for.</summary>
    public FaultException Deadlock()
    {
        var waiting = Array.Find(_warps, w => w.State == WarpState.AtBarrier)
            ?? Array.Find(_warps, w => w.State != WarpState.Done)!;
        string others = string.Join("; ", _warps.Where(w => w != waiting).Take(8).Select(w =>
            w.State switch
            {
                WarpState.Done => $"warp {w.Index} has returned",
                WarpState.AtBarrier =>
                    $"warp {w.Index} waits at barrier {w.BarrierId}, {Where(w)}",
                _ => $"warp {w.Index} waits at {Where(w)}",
            }).Concat(Barriers.Describe().Take(8)));
        string what = waiting.State switch
        {
            WarpState.AtBarrier => $"barrier {waiting.BarrierId} never opens",
            WarpState.AtGroup => "the other warps of the warpgroup do not come",
            _ => "what it waits for does not happen",
        };
        return waiting.Fault(Check.Deadlock, 0, $"{what}: {others}");
    }

    private string Where(Warp warp)
    {
        var source = Program.Code[warp.Pc].Source;
        return source.Source.Line > 0 ? $"{source.Source}" : $"\"{source.Text}\"";
    }

    // A barrier opens when its threads have come; without a count, when all warps that live have.
    private bool OpenBarriers()
    {
        bool opened = false;
        for (int id = 0; id < 16; id++)
        {
            int waiting = 0, live = 0, wanted = 0;
            foreach (var warp in _warps)
            {
                if (warp.State != WarpState.Done) live++;
                if (warp.State != WarpState.AtBarrier || warp.BarrierId != id) continue;
                waiting++;
                wanted = warp.BarrierThreads;
            }
            if (waiting == 0) continue;
            if (wanted == 0 ? waiting < live : waiting * 32 + _arrived[id] < wanted) continue;
            Shared.Synchronise(_warps, id, counted: wanted > 0);
            _arrived[id] = 0;
            foreach (var warp in _warps)
                if (warp.State == WarpState.AtBarrier && warp.BarrierId == id) warp.Release();
            opened = true;
            Events++;
        }
        return opened;
    }

    private void Shuffle()
    {
        if (_random == 0) return;
        for (int w = _order.Length - 1; w > 0; w--)
        {
            int other = (int)(Next() % (ulong)(w + 1));
            (_order[w], _order[other]) = (_order[other], _order[w]);
        }
    }

    private ulong Next()
    {
        _random ^= _random << 13;
        _random ^= _random >> 7;
        return _random ^= _random << 17;
    }

    /// <summary>Adds what the executed instructions amount to, to the counters.</summary>
    public void Count()
    {
        for (int pc = 0; pc < Issued.Length; pc++)
        {
            if (Issued[pc] == 0) continue;
            var i = Program.Code[pc];
            Counters.Instructions += Issued[pc];
            Counters.LaneInstructions += Lanes[pc];
            if (i.TensorFlops) Counters.TensorFlops += Issued[pc] * i.Flops;
            else Counters.Flops += Lanes[pc] * i.Flops;
            string opcode = i.Source.Opcode;
            int dot = opcode.IndexOf('.');
            string stem = dot < 0 ? opcode : opcode[..dot];
            Counters.Mix[stem] = Counters.Mix.GetValueOrDefault(stem) + Issued[pc];
        }
    }

    public void Dispose()
    {
        foreach (var warp in _warps) warp.Free();
        Shared.Dispose();
    }
}
