using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

/// <summary>What all blocks of one launch share.</summary>
internal sealed record Launch(
    Program Program, (int X, int Y, int Z) Grid, (int X, int Y, int Z) Size, int DynamicShared,
    byte[] Arguments, DeviceMemory Memory, EmulatorOptions Options, ulong Seed)
{
    public int Threads => Size.X * Size.Y * Size.Z;
    public long Blocks => (long)Grid.X * Grid.Y * Grid.Z;
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
    private readonly int[] _arrived = new int[16];
    private ulong _random;

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
    }

    public Launch Launch { get; }
    public Program Program => Launch.Program;
    public EmulatorOptions Options => Launch.Options;
    public DeviceMemory Memory => Launch.Memory;
    public (int X, int Y, int Z) Grid => Launch.Grid;
    public (int X, int Y, int Z) Size => Launch.Size;
    public int DynamicShared => Launch.DynamicShared;
    public int WarpCount => _warps.Length;
    public (int X, int Y, int Z) Place { get; private set; }
    public LaunchCounters Counters { get; }

    /// <summary>Per instruction: times issued, and lanes that took part.</summary>
    public long[] Issued { get; }
    public long[] Lanes { get; }
    public SharedMemory Shared { get; }

    /// <summary>This block's mark in <see cref="Allocation.Writers"/>.</summary>
    public uint Stamp { get; private set; }

    /// <summary>Branches of one turn; 0 is the default.</summary>
    public int Quantum { get; private set; }

    public void Run(long index)
    {
        var grid = Launch.Grid;
        Place = ((int)(index % grid.X), (int)(index / grid.X % grid.Y),
            (int)(index / grid.X / grid.Y));
        Stamp = Launch.Memory.LaunchStamp + (uint)index;
        _random = Launch.Seed == 0 ? 0 : Launch.Seed ^ (ulong)index * 0x9E3779B97F4A7C15;
        Shared.Begin();
        Array.Clear(_arrived);
        for (int w = 0; w < _warps.Length; w++)
        {
            _order[w] = w;
            _warps[w].Prepare(Program, Math.Min(32, Launch.Threads - w * 32));
            _warps[w].Start(Program);
        }
        while (Turn()) { }
    }

    /// <summary>A warp arrives at a numbered barrier without waiting for it.</summary>
    public void Arrive(int barrier) => _arrived[barrier] += 32;

    private bool Turn()
    {
        bool ran = false;
        Shuffle();
        foreach (int w in _order)
        {
            if (_warps[w].State != WarpState.Ready) continue;
            if (_random != 0) Quantum = 1 + (int)(Next() % 64);
            _warps[w].Run();
            ran = true;
        }
        if (OpenBarriers()) return true;
        if (ran) return true;
        var waiting = Array.Find(_warps, w => w.State == WarpState.AtBarrier);
        if (waiting == null) return false;
        string others = string.Join("; ", _warps.Where(w => w != waiting).Take(8).Select(w =>
            w.State == WarpState.Done
                ? $"warp {w.Index} has returned"
                : $"warp {w.Index} waits at barrier {w.BarrierId}, {Program.Code[w.Pc].Source.Source}"));
        throw waiting.Fault(Check.Deadlock, 0,
            $"barrier {waiting.BarrierId} never opens: {others}");
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
            Shared.Synchronise(_warps, id);
            _arrived[id] = 0;
            foreach (var warp in _warps)
                if (warp.State == WarpState.AtBarrier && warp.BarrierId == id) warp.Release();
            opened = true;
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
