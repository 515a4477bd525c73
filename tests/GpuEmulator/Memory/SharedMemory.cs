using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>
/// A block's shared memory with a race detector. Every 4-byte word remembers its last write and its
/// reads as (time, warp, lane, bytes). Time is one counter of the block that a barrier or a
/// __syncwarp advances; known[v][w] is the last time of warp w that is ordered before warp v's
/// present. An access to a word that another lane wrote (or a write where it read), later than what
/// is known, is a race. Words shared by narrower accesses of several lanes are not judged within a
/// warp, and equal values written twice are no race: no report is ever wrong, a few may be missed.
/// </summary>
internal sealed unsafe partial class SharedMemory : IDisposable
{
    /// <summary>The first address, as on devices that reserve the first KiB.</summary>
    public const int First = 1024;

    private const byte Written = 1, Pending = 2, Barrier = 3;
    private const uint AllBytes = 15, SeveralLanes = 32, Narrow = 34, Atomic = 35,
        Bulk = 37, SeveralWarps = 63;

    private readonly int[] _known;
    private readonly int _warps;
    private readonly uint* _writers, _readers;
    private readonly byte* _state;
    private uint _time, _floor;

    public SharedMemory(int bytes, int warps)
    {
        (Bytes, _warps) = (bytes, warps);
        nuint padded = (nuint)(bytes + 127) / 128 * 128 + 128;
        Host = (byte*)NativeMemory.AlignedAlloc(padded, 64);
        _state = (byte*)NativeMemory.AlignedAlloc(padded, 64);
        _writers = (uint*)NativeMemory.AlignedAlloc(padded, 64);
        _readers = (uint*)NativeMemory.AlignedAlloc(padded, 64);
        _known = new int[warps * warps];
        for (int n = 0; n < _arrivals.Length; n++) _arrivals[n] = new int[warps * 2];
        _proxied = new int[warps * warps];
    }

    public int Bytes { get; }
    public byte* Host { get; }

    /// <summary>A new block begins: nothing is written, nobody has met.</summary>
    public void Begin()
    {
        new Span<byte>(Host, Bytes).Fill(0xFF);
        new Span<byte>(_state, Bytes).Clear();
        new Span<byte>(_writers, Bytes + 4).Clear();
        new Span<byte>(_readers, Bytes + 4).Clear();
        Forget();
        ForgetGroups(all: true);
    }

    /// <summary>The warps that wait at this barrier meet.</summary>
    public void Synchronise(Warp[] warps, int barrier, bool counted)
    {
        bool all = true;
        foreach (var warp in warps)
            all &= (warp.State == WarpState.Done && !counted)
                || Meets(warp, barrier);
        MeetProxies(warps, barrier);
        if (all)
        {
            // Nobody is left behind: one limit says it; warps that have returned count for a
            // barrier of the whole block.
            Array.Clear(_arrivals[barrier]);
            _floor = (_time << 15) | 0x7fff;
            Tick();
            return;
        }
        for (int other = 0; other < _warps; other++)
        {
            int latest = 0;
            foreach (var w in warps)
                if (Meets(w, barrier)) latest = Math.Max(latest, _known[w.Index * _warps + other]);
            if (Meets(warps[other], barrier)) latest = (int)_time;
            latest = Math.Max(latest, _arrivals[barrier][other]);
            foreach (var w in warps)
                if (Meets(w, barrier)) _known[w.Index * _warps + other] = latest;
        }
        Array.Clear(_arrivals[barrier]);
        Tick();
    }

    /// <summary>__syncwarp: the lanes of one warp meet.</summary>
    public void SynchroniseWarp(int warp)
    {
        _known[warp * _warps + warp] = (int)_time;
        Tick();
    }

    // Times have 17 bits; when they run out, history is dropped as if everyone had met.
    private void Tick()
    {
        if (++_time < 1u << 17) return;
        new Span<byte>(_writers, Bytes + 4).Clear();
        new Span<byte>(_readers, Bytes + 4).Clear();
        Forget();
    }

    private void Forget()
    {
        Array.Clear(_known);
        Array.Clear(_proxied);
        ForgetGroups(all: false);
        foreach (int[] clock in _arrivals) Array.Clear(clock);
        _time = 1;
        _floor = 0x7fff;
        Epoch++;
    }

    private uint Cell(int warp, uint lane, uint bytes) =>
        (_time << 15) | ((uint)warp << 10) | (lane << 4) | bytes;

    /// <summary>Host address of an access, or a fault.</summary>
    public byte* Resolve(Warp w, ulong address, int bytes, int lane)
    {
        if ((address & (ulong)(bytes - 1)) != 0)
            throw w.Fault(Check.Misaligned, lane, $"{bytes} bytes at shared address 0x{address:x}");
        if (address < First || address - First > (ulong)Bytes
            || (ulong)Bytes - (address - First) < (ulong)bytes)
            throw w.Fault(Check.OutOfBounds, lane,
                $"{bytes} bytes at {(long)(address - First)} of {Bytes} bytes of shared memory");
        return Host + (address - First);
    }

    /// <summary>32 lanes read one 4-byte word each, in a row: checked at once. False: go lane by
    /// lane.</summary>
    public bool TryReadRow(Warp w, byte* at)
    {
        long offset = at - Host;
        if (offset + 128 > Bytes) return false;
        var written = Vector256.Create(Written);
        var limit = Vector256.Create(_floor);
        for (int v = 0; v < 4; v++)
        {
            if (Vector256.Load(_state + offset + v * 32) != written) return false;
            if (Vector256.GreaterThanAny(Vector256.Load(_writers + offset / 4 + v * 8), limit))
                return false;
            if (Vector256.GreaterThanAny(Vector256.Load(_readers + offset / 4 + v * 8), limit))
                return false;
        }
        var mine = Vector256.Create(Cell(w.Index, 0, AllBytes)) + (Vector256<uint>.Indices << 4);
        for (int v = 0; v < 4; v++)
            (mine + Vector256.Create((uint)v * 128)).Store(_readers + offset / 4 + v * 8);
        return true;
    }

    /// <summary>A 16-byte row of a matrix, read by the warp as a whole.</summary>
    public void ReadMatrixRow(Warp w, byte* at, int lane)
    {
        long offset = at - Host;
        uint* readers = _readers + offset / 4;
        var limit = Vector128.Create(_floor);
        if (Vector128.Load(_state + offset) == Vector128.Create(Written)
            && !Vector128.GreaterThanAny(Vector128.Load(_writers + offset / 4), limit))
        {
            var mine = Vector128.Create(Cell(w.Index, SeveralLanes, AllBytes));
            var seen = Vector128.Load(readers);
            if (seen == mine) return;
            if (!Vector128.GreaterThanAny(seen, limit))
            {
                mine.Store(readers);
                return;
            }
            // Read at this very time by another warp as a row, or by several: no order to look up.
            uint first = seen[0], lanes = (first >> 4) & 63;
            if (seen == Vector128.Create(first) && first >> 15 == _time && (first & 15) == AllBytes
                && (lanes == SeveralWarps
                    || (lanes == SeveralLanes && ((first >> 10) & 31) != (uint)w.Index)))
            {
                Vector128.Create(Cell(w.Index, SeveralWarps, AllBytes)).Store(readers);
                return;
            }
        }
        Read(w, at, 16, lane | 32);
    }

    /// <summary>One lane reads; 32 + lane stands for a matrix row, read by the warp
    /// together.</summary>
    public void Read(Warp w, byte* at, int bytes, int lane)
    {
        long offset = at - Host;
        var states = new ReadOnlySpan<byte>(_state + offset, bytes);
        if (states.ContainsAnyExcept(Written))
            throw Unreadable(w, lane & 31, offset + states.IndexOfAnyExcept(Written));
        uint mask = bytes >= 4 ? AllBytes : ((1u << bytes) - 1) << (int)(offset & 3);
        uint who = lane >= 32 ? SeveralLanes : (uint)lane;
        for (long word = offset / 4; word < (offset + bytes + 3) / 4; word++)
        {
            uint writer = _writers[word];
            if (writer > _floor) CheckAgainst(w, writer, mask, who, word, "is read, written by");
            NoteRead(w, word, mask, who);
        }
    }

    /// <summary>The reading half of an atomic: other atomics since the last meeting are no
    /// race.</summary>
    public void ReadAtomic(Warp w, byte* at, int bytes, int lane)
    {
        long offset = at - Host;
        for (int b = 0; b < bytes; b++)
            if (_state[offset + b] == 0)
                throw w.Fault(Check.Uninitialised, lane,
                    $"shared byte {offset + b} was never written");
    }

    private void NoteRead(Warp w, long word, uint mask, uint lane)
    {
        uint reader = _readers[word];
        uint mine = Cell(w.Index, lane, mask);
        if (reader > _floor)
        {
            uint warp = (reader >> 10) & 31, other = (reader >> 4) & 63, both = (reader & 15)
                | mask;
            bool ordered = reader >> 15 <= (uint)_known[w.Index * _warps + (int)warp];
            if (!ordered && warp != (uint)w.Index)
                mine = Cell(w.Index, (reader & 15 & mask) == AllBytes ? SeveralWarps : Narrow,
                    both);
            else if (!ordered && other != lane)
                mine = Cell(w.Index, other == SeveralWarps ? SeveralWarps
                    : other != Narrow && (reader & 15 & mask) == AllBytes ? SeveralLanes : Narrow,
                    both);
        }
        _readers[word] = mine;
    }

    /// <summary>One lane writes value's bytes; the bytes themselves are stored by the caller
    /// after.</summary>
    public void Write(Warp w, byte* at, byte* value, int bytes, int lane, bool atomic = false)
    {
        long offset = at - Host;
        var states = new Span<byte>(_state + offset, bytes);
        if (states.Contains(Pending))
            throw w.Fault(Check.AsyncCopyNotWaitedFor, lane,
                $"shared byte {offset + states.IndexOf(Pending)} is written while cp.async may still write it");
        if (states.Contains(Barrier))
            throw TouchesBarrier(w, lane, offset + states.IndexOf(Barrier), "written");
        bool same = value != null && !states.ContainsAnyExcept(Written)
            && new Span<byte>(at, bytes).SequenceEqual(new Span<byte>(value, bytes));
        states.Fill(Written);
        NoteWrite(w, offset, bytes, (uint)lane, atomic, same);
    }

    private void NoteWrite(Warp w, long offset, int bytes, uint lane, bool atomic, bool same)
    {
        if (!same && _groupReads.Length > 0) CheckGroupReads(w, offset, bytes, (int)lane);
        if (!same && _bulkReads != null) CheckBulkReads(w, offset, bytes, (int)lane);
        uint mask = bytes >= 4 ? AllBytes : ((1u << bytes) - 1) << (int)(offset & 3);
        for (long word = offset / 4; word < (offset + bytes + 3) / 4; word++)
        {
            uint writer = _writers[word], reader = _readers[word];
            bool bothAtomic = atomic && ((writer & 15) == 0 || ((writer >> 4) & 63) == Atomic);
            if (writer > _floor && !same && !bothAtomic)
                CheckAgainst(w, writer, mask, lane, word, "is written, and so it was by");
            if (reader > _floor && !same)
                CheckAgainst(w, reader, mask, lane, word, "is written, read by");
            // An atomic of one lane has no bytes; others that follow make it one of several.
            uint mine = Cell(w.Index, lane, atomic ? 0 : mask);
            if (writer > _floor && bothAtomic && ((writer ^ mine) >> 4 & 0x7FF) != 0)
                mine = Cell(w.Index, Atomic, AllBytes);
            if (writer > _floor && !atomic && mask != AllBytes && writer >> 15 == _time
                && ((writer >> 4) & 63) != lane)
                mine = Cell(w.Index, Narrow, mask | (writer & 15));
            _writers[word] = mine;
        }
    }

    private void CheckAgainst(Warp w, uint cell, uint mask, uint lane, long word, string what)
    {
        uint time = cell >> 15, warp = (cell >> 10) & 31, other = (cell >> 4) & 63;
        if ((cell & 15) == 0) cell |= AllBytes;
        if ((cell & mask) == 0 || other == Narrow) return;
        if (other == SeveralWarps)
        {
            for (int v = 0; v < _warps; v++)
                if (v != w.Index && time <= (uint)_known[w.Index * _warps + v]) return;
            throw w.Fault(Check.SharedRaceBetweenWarps, (int)lane & 31,
                $"shared word {word * 4} {what} several warps, and no barrier stands between");
        }
        if (time <= (uint)_known[w.Index * _warps + (int)warp]) return;
        if (other == Bulk)
            throw w.Fault(Check.AsyncCopyNotWaitedFor, (int)lane & 31,
                $"shared word {word * 4} {what} a bulk copy of warp {warp}, whose barrier has not " +
                "been waited for");
        if (warp != (uint)w.Index)
            throw w.Fault(Check.SharedRaceBetweenWarps, (int)lane & 31,
                $"shared word {word * 4} {what} warp {warp}, and no barrier stands between");
        if (other == lane || (other == SeveralLanes && lane == 32)) return;
        throw w.Fault(Check.SharedRaceWithinWarp, (int)lane & 31,
            $"shared word {word * 4} {what} another lane of the warp" +
            (other < 32 ? $" ({other})" : "") + ", and no __syncwarp stands between");
    }

    /// <summary>cp.async is issued: from now until its wait nobody may touch the bytes.</summary>
    public void BeginCopy(Warp w, byte* at, int bytes, int lane)
    {
        long offset = at - Host;
        for (int b = 0; b < bytes; b++)
        {
            if (_state[offset + b] == Pending)
                throw w.Fault(Check.AsyncCopyNotWaitedFor, lane,
                    $"shared byte {offset + b} is the target of two copies in flight");
        }
        NoteWrite(w, offset, bytes, (uint)lane, atomic: false, same: false);
        new Span<byte>(at, bytes).Fill(0xFF);
        new Span<byte>(_state + offset, bytes).Fill(Pending);
    }

    /// <summary>The copy has arrived, for the lane that waited for it.</summary>
    public void EndCopy(Warp w, byte* at, int bytes, int lane)
    {
        long offset = at - Host;
        new Span<byte>(_state + offset, bytes).Fill(Written);
        for (long word = offset / 4; word < (offset + bytes) / 4; word++)
            _writers[word] = Cell(w.Index, (uint)lane, AllBytes);
    }

    public void Dispose()
    {
        NativeMemory.AlignedFree(Host);
        NativeMemory.AlignedFree(_state);
        NativeMemory.AlignedFree(_writers);
        NativeMemory.AlignedFree(_readers);
    }
}
