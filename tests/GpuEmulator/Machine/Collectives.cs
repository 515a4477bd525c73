using System.Numerics;
using MiniCpmNative.GpuEmulator.Memory;

namespace MiniCpmNative.GpuEmulator.Machine;

internal enum Shuffle : byte
{
    Up, Down, Butterfly, Index,
}

internal enum Reduction : byte
{
    Add, Min, Max, And, Or, Xor,
}

internal enum Vote : byte
{
    All, Any, Uniform, Ballot,
}

/// <summary>Instructions in which lanes of a warp read one another (PTX ISA 9.7.9 and
/// 9.7.13).</summary>
internal static unsafe class Collectives
{
    /// <summary>Lanes that must come together: the member mask in row E, or all without
    /// one.</summary>
    public static uint Members(Warp w, Instruction i, uint exec)
    {
        if (i.E < 0 || exec == 0) return uint.MaxValue;
        uint members = ((uint*)(w.R + i.E))[BitOperations.TrailingZeroCount(exec)];
        if ((exec & ~members) != 0)
            throw w.Fault(Check.LaneMissing, BitOperations.TrailingZeroCount(exec & ~members),
                $"a lane executes this that is not in its member mask 0x{members:x8}");
        return members;
    }

    public static void Shuffle(Warp w, Instruction i)
    {
        uint* a = (uint*)(w.R + i.A), b = (uint*)(w.R + i.B), c = (uint*)(w.R + i.C);
        uint* result = stackalloc uint[32];
        uint within = 0;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            int by = (int)(b[lane] & 31), clamp = (int)(c[lane] & 31),
                segment = (int)(c[lane] >> 8 & 31);
            int most = (lane & segment) | (clamp & ~segment);
            int from = (Machine.Shuffle)i.Mode switch
            {
                Machine.Shuffle.Up => lane - by,
                Machine.Shuffle.Down => lane + by,
                Machine.Shuffle.Butterfly => lane ^ by,
                _ => (lane & segment) | (by & ~segment),
            };
            bool inside = (Machine.Shuffle)i.Mode == Machine.Shuffle.Up ? from >= most
                : from <= most;
            if (inside) within |= 1u << lane;
            else from = lane;
            if ((w.Exec >> from & 1) == 0)
                throw w.Fault(Check.LaneMissing, lane, $"reads lane {from}, which is not here");
            result[lane] = a[from];
        }
        uint* d = (uint*)(w.R + i.D);
        for (uint rest = w.Exec; rest != 0 && i.D >= 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            d[lane] = result[lane];
        }
        if (i.D2 >= 0) Predicate(w, i.D2, within);
    }

    public static void Vote(Warp w, Instruction i)
    {
        uint yes = (*(uint*)(w.R + i.A) ^ i.FlipA) & w.Exec;
        switch ((Vote)i.Mode)
        {
            case Machine.Vote.Ballot: Word(w, i.D, yes); break;
            case Machine.Vote.All: Predicate(w, i.D, yes == w.Exec ? ~0u : 0); break;
            case Machine.Vote.Any: Predicate(w, i.D, yes != 0 ? ~0u : 0); break;
            default: Predicate(w, i.D, yes == w.Exec || yes == 0 ? ~0u : 0); break;
        }
    }

    public static void Reduce<T>(Warp w, Instruction i) where T : unmanaged, IBinaryInteger<T>
    {
        T* a = (T*)(w.R + i.A);
        T value = default;
        bool first = true;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            T next = a[BitOperations.TrailingZeroCount(rest)];
            value = first ? next : (Reduction)i.Mode switch
            {
                Reduction.Add => value + next,
                Reduction.Min => T.Min(value, next),
                Reduction.Max => T.Max(value, next),
                Reduction.And => value & next,
                Reduction.Or => value | next,
                _ => value ^ next,
            };
            first = false;
        }
        Word(w, i.D, uint.CreateTruncating(value));
    }

    /// <summary>match.any (Mode 0): lanes with my value; match.all (Mode 1): all lanes or
    /// none.</summary>
    public static void Match<T>(Warp w, Instruction i) where T : unmanaged, IBinaryInteger<T>
    {
        T* a = (T*)(w.R + i.A);
        uint* d = (uint*)(w.R + i.D);
        uint* result = stackalloc uint[32];
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            uint equal = 0;
            for (uint others = w.Exec; others != 0; others &= others - 1)
            {
                int other = BitOperations.TrailingZeroCount(others);
                if (a[other] == a[lane]) equal |= 1u << other;
            }
            result[lane] = i.Mode == 0 || equal == w.Exec ? equal : 0;
        }
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            d[lane] = result[lane];
        }
        if (i.D2 >= 0)
            Predicate(w, i.D2, result[BitOperations.TrailingZeroCount(w.Exec)] != 0 ? ~0u : 0);
    }

    /// <summary>elect.sync D|D2: the lowest lane of the members is the leader.</summary>
    public static void Elect(Warp w, Instruction i)
    {
        int leader = BitOperations.TrailingZeroCount(w.Exec);
        if (i.D >= 0) Word(w, i.D, (uint)leader);
        if (i.D2 >= 0) Predicate(w, i.D2, 1u << leader);
    }

    public static void SynchroniseWarp(Warp w, Instruction i) =>
        w.Block.Shared.SynchroniseWarp(w.Index);

    /// <summary>bar.sync A[, B]: the number and the thread count are equal in all lanes.</summary>
    public static void Barrier(Warp w, Instruction i)
    {
        w.BarrierId = (int)*(uint*)(w.R + i.A);
        w.BarrierThreads = i.B >= 0 ? (int)*(uint*)(w.R + i.B) : 0;
        if (w.BarrierId is < 0 or > 15)
            throw w.Fault(Check.BarrierDivergence, 0,
                $"barrier {w.BarrierId} does not exist: 0 to 15 do");
        if (w.BarrierThreads % 32 != 0)
            throw w.Fault(Check.BarrierDivergence, 0,
                $"{w.BarrierThreads} threads are not whole warps");
        if (i.Mode2 == 1) w.Block.Arrive(w, w.BarrierId);
    }

    private static void Word(Warp w, int row, uint value)
    {
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            ((uint*)(w.R + row))[BitOperations.TrailingZeroCount(rest)] = value;
    }

    private static void Predicate(Warp w, int row, uint value)
    {
        uint* d = (uint*)(w.R + row);
        *d = (*d & ~w.Exec) | (value & w.Exec);
    }
}
