using System.Numerics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// The mbarrier objects of one block (PTX ISA, "mbarrier"). A phase completes when no arrival and
/// no byte is pending. An arrival hands on all that its warp knows to be ordered; who has seen the
/// phase complete knows it too. A state is the number of the phase it belongs to.
/// </summary>
internal sealed unsafe class MemoryBarriers(SharedMemory shared)
{
    private const int MostArrivals = (1 << 20) - 1;

    public sealed class Barrier(int at, int count, int clock)
    {
        public readonly int At = at;
        public int Count = count, Pending = count, Owner, Made;
        public long Bytes, Phase;
        public int[] Collecting = new int[clock], Published = new int[clock];
        public int Epoch;
    }

    private readonly Dictionary<int, Barrier> _all = [];

    /// <summary>Phases completed in this block: the scheduler's sign of progress.</summary>
    public long Completed { get; private set; }

    public void Clear() => _all.Clear();

    /// <summary>mbarrier.init [A], B.</summary>
    public static void Initialise(Warp w, Instruction i) => Each(w, i,
        static (w, i, lane, address) =>
        {
            var shared = w.Block.Shared;
            int count = (int)((uint*)(w.R + i.B))[lane];
            if (count is < 1 or > MostArrivals)
                throw w.Fault(Check.MemoryBarrier, lane, $"{count} arrivals: 1 to {MostArrivals}");
            byte* at = shared.Resolve(w, address, 8, lane);
            int offset = (int)(at - shared.Host);
            var all = w.Block.Barriers._all;
            if (all.ContainsKey(offset))
                throw w.Fault(Check.MemoryBarrier, lane,
                    $"shared byte {offset} holds a barrier already: mbarrier.inval ends one");
            shared.Write(w, at, null, 8, lane);
            shared.SetBarrier(offset, isBarrier: true);
            all[offset] = new(offset, count, shared.ClockSize)
            {
                Owner = w.Index,
                Made = shared.Time,
                Epoch = shared.Epoch,
            };
        });

    /// <summary>mbarrier.inval [A].</summary>
    public static void Invalidate(Warp w, Instruction i) => Each(w, i,
        static (w, i, lane, address) =>
        {
            var barrier = w.Block.Barriers.Find(w, address, lane);
            w.Block.Shared.SetBarrier(barrier.At, isBarrier: false);
            w.Block.Barriers._all.Remove(barrier.At);
        });

    /// <summary>mbarrier.arrive D, [A], B: B arrivals, or B bytes expected first where Mode is
    /// Expecting. Mode2 1: the phase may not complete; 2: the count drops for good.</summary>
    public static void Arrive(Warp w, Instruction i) => Each(w, i,
        static (w, i, lane, address) =>
        {
            var barriers = w.Block.Barriers;
            var barrier = barriers.Find(w, address, lane);
            int operand = i.B >= 0 ? (int)((uint*)(w.R + i.B))[lane] : 1, arrivals = operand;
            if (i.Mode == Expecting)
            {
                barriers.AddBytes(w, lane, barrier, operand);
                arrivals = 1;
            }
            if (i.D >= 0) ((ulong*)(w.R + i.D))[lane] = (ulong)barrier.Phase;
            if (i.Mode2 == 1 && barrier.Pending <= arrivals)
                throw w.Fault(Check.MemoryBarrier, lane,
                    $"arrive.noComplete takes the last {barrier.Pending} pending arrivals");
            barriers.Arrive(w, lane, barrier, arrivals);
            if (i.Mode2 == 2) barrier.Count -= arrivals;
        });

    public const int Expecting = 1;

    /// <summary>mbarrier.expect_tx (Mode 1) or complete_tx (Mode -1) [A], B.</summary>
    public static void Bytes(Warp w, Instruction i) => Each(w, i,
        static (w, i, lane, address) =>
        {
            var barriers = w.Block.Barriers;
            var barrier = barriers.Find(w, address, lane);
            barriers.AddBytes(w, lane, barrier, i.Mode * (long)((uint*)(w.R + i.B))[lane]);
            barriers.TryComplete(barrier);
        });

    /// <summary>mbarrier.test_wait and try_wait D, [A], B: B is a state, or with Mode 1 a parity.
    /// A warp of which a lane fails gives up its turn.</summary>
    public static void Wait(Warp w, Instruction i)
    {
        uint done = 0;
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            var barrier = w.Block.Barriers.Find(w, Address.ToShared(w.Addresses[lane]), lane);
            bool complete;
            if (i.Mode == 1)
            {
                uint parity = ((uint*)(w.R + i.B))[lane];
                if (parity > 1)
                    throw w.Fault(Check.MemoryBarrier, lane, $"phase parity {parity}: 0 or 1");
                complete = (barrier.Phase & 1) != parity;
            }
            else
            {
                long phase = (long)((ulong*)(w.R + i.B))[lane];
                if (phase != barrier.Phase && phase != barrier.Phase - 1)
                    throw w.Fault(Check.MemoryBarrier, lane,
                        $"the state is of phase {phase}, the barrier at shared byte {barrier.At} " +
                        $"is in phase {barrier.Phase}");
                complete = phase != barrier.Phase;
            }
            if (!complete) continue;
            done |= 1u << lane;
            if (barrier.Epoch == w.Block.Shared.Epoch)
                w.Block.Shared.Acquire(w.Index, barrier.Published);
        }
        uint* d = (uint*)(w.R + i.D);
        *d = (*d & ~w.Exec) | done;
        w.Polled = done != w.Exec;
    }

    /// <summary>Arrivals of a lane, or of copies that a lane has started.</summary>
    public void Arrive(Warp w, int lane, Barrier barrier, int arrivals)
    {
        if (arrivals < 1 || arrivals > barrier.Pending)
            throw w.Fault(Check.MemoryBarrier, lane,
                $"{arrivals} arrivals at the barrier at shared byte {barrier.At}, {barrier.Pending} " +
                $"of {barrier.Count} are pending in phase {barrier.Phase}");
        Renew(barrier);
        shared.Publish(w.Index, barrier.Collecting);
        barrier.Pending -= arrivals;
        TryComplete(barrier);
    }

    /// <summary>Bytes that a lane has ordered have come.</summary>
    public void Transferred(Warp w, int lane, Barrier barrier, int bytes)
    {
        Renew(barrier);
        shared.Publish(w.Index, barrier.Collecting);
        AddBytes(w, lane, barrier, -bytes);
        TryComplete(barrier);
    }

    public void AddBytes(Warp w, int lane, Barrier barrier, long bytes)
    {
        barrier.Bytes += bytes;
        if (Math.Abs(barrier.Bytes) > MostArrivals)
            throw w.Fault(Check.MemoryBarrier, lane,
                $"{barrier.Bytes} bytes pending at the barrier at shared byte {barrier.At}: at most " +
                $"{MostArrivals}");
    }

    public void TryComplete(Barrier barrier)
    {
        if (barrier.Pending > 0 || barrier.Bytes != 0) return;
        Renew(barrier);
        barrier.Phase++;
        barrier.Pending = barrier.Count;
        // What earlier phases ordered stays ordered.
        for (int n = 0; n < barrier.Published.Length; n++)
            barrier.Published[n] = Math.Max(barrier.Published[n], barrier.Collecting[n]);
        Completed++;
    }

    // Times of before the clock's wrap mean nothing any more.
    private void Renew(Barrier barrier)
    {
        if (barrier.Epoch == shared.Epoch) return;
        Array.Clear(barrier.Collecting);
        Array.Clear(barrier.Published);
        barrier.Epoch = shared.Epoch;
    }

    /// <summary>The barrier at an address, ready for this warp.</summary>
    public Barrier Find(Warp w, ulong address, int lane)
    {
        int offset = (int)(shared.Resolve(w, address, 8, lane) - shared.Host);
        if (!_all.TryGetValue(offset, out var barrier))
            throw w.Fault(Check.MemoryBarrier, lane,
                $"shared byte {offset} holds no barrier: mbarrier.init makes one");
        if (barrier.Owner != w.Index && barrier.Epoch == shared.Epoch
            && !shared.Knows(w.Index, barrier.Owner, barrier.Made))
            throw w.Fault(Check.SharedRaceBetweenWarps, lane,
                $"the barrier at shared byte {offset} was made by warp {barrier.Owner}, and no " +
                "barrier stands between");
        return barrier;
    }

    /// <summary>What is waited for, for a report.</summary>
    public IEnumerable<string> Describe() => _all.Values.OrderBy(b => b.At).Select(b =>
        $"mbarrier at shared byte {b.At}: phase {b.Phase}, {b.Pending} of {b.Count} arrivals and " +
        $"{b.Bytes} bytes pending");

    private static void Each(Warp w, Instruction i,
        Action<Warp, Instruction, int, ulong> lane)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int n = BitOperations.TrailingZeroCount(rest);
            lane(w, i, n, Address.ToShared(w.Addresses[n]));
        }
    }
}
