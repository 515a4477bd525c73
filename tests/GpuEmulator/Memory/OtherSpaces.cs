using System.Numerics;
using System.Runtime.CompilerServices;
using MiniCpmNative.GpuEmulator.Machine;

namespace MiniCpmNative.GpuEmulator.Memory;

/// <summary>Loads and stores of shared, local, parameter and generic memory.</summary>
internal static unsafe class OtherSpaces
{
    public static void LoadShared(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        LoadSharedAt(w, i, w.Exec);
    }

    public static void StoreShared(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        StoreSharedAt(w, i, w.Exec);
    }

    private static void LoadSharedAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        ulong* address = w.Addresses;
        var shared = w.Block.Shared;
        w.Counters.SharedRequests++;
        bool inRow = exec == uint.MaxValue && Address.IsRow(address, bytes);
        if (inRow && bytes == 4 && address[0] >= SharedMemory.First
            && address[0] - SharedMemory.First + 128 <= (ulong)shared.Bytes && address[0] % 4 == 0)
        {
            byte* row = shared.Host + (address[0] - SharedMemory.First);
            if (shared.TryReadRow(w, row))
            {
                Lanes.ToRegisters(w, i, row, exec);
                return;
            }
        }
        if (!inRow) w.Counters.BankConflicts += BankConflicts.Count(address, exec, bytes);
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            byte* from = shared.Resolve(w, address[lane], bytes, lane);
            shared.Read(w, from, bytes, lane);
            Unsafe.CopyBlock(w.Staging + lane * bytes, from, (uint)bytes);
        }
        Lanes.ToRegisters(w, i, w.Staging, exec);
    }

    private static void StoreSharedAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        var shared = w.Block.Shared;
        w.Counters.SharedRequests++;
        w.Counters.BankConflicts += BankConflicts.Count(w.Addresses, exec, bytes);
        Lanes.FromRegisters(w, i, w.Staging, exec);
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            byte* to = shared.Resolve(w, w.Addresses[lane], bytes, lane);
            shared.Write(w, to, w.Staging + lane * bytes, bytes, lane);
            Unsafe.CopyBlock(to, w.Staging + lane * bytes, (uint)bytes);
        }
    }

    public static void LoadLocal(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        LoadLocalAt(w, i, w.Exec);
    }

    public static void StoreLocal(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        StoreLocalAt(w, i, w.Exec);
    }

    private static void LoadLocalAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        w.Counters.LocalBytes += bytes * BitOperations.PopCount(exec);
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            long at = LocalPlace(w, w.Addresses[lane], bytes, lane);
            for (int b = 0; b < bytes; b++)
            {
                if (w.LocalState[at + b] == 0)
                    throw w.Fault(Check.Uninitialised, lane,
                        $"local byte {at + b} was never written");
            }
            Unsafe.CopyBlock(w.Staging + lane * bytes, w.Local + at, (uint)bytes);
        }
        Lanes.ToRegisters(w, i, w.Staging, exec);
    }

    private static void StoreLocalAt(Warp w, Instruction i, uint exec)
    {
        int bytes = i.Size * i.Count;
        w.Counters.LocalBytes += bytes * BitOperations.PopCount(exec);
        Lanes.FromRegisters(w, i, w.Staging, exec);
        for (uint rest = exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            long at = LocalPlace(w, w.Addresses[lane], bytes, lane);
            new Span<byte>(w.LocalState + at, bytes).Fill(1);
            Unsafe.CopyBlock(w.Local + at, w.Staging + lane * bytes, (uint)bytes);
        }
    }

    private static long LocalPlace(Warp w, ulong address, int bytes, int lane)
    {
        int size = w.Block.Program.LocalBytes;
        if (address % (ulong)bytes != 0)
            throw w.Fault(Check.Misaligned, lane, $"{bytes} bytes at local address {address}");
        if (address > (ulong)size || (ulong)size - address < (ulong)bytes)
            throw w.Fault(Check.OutOfBounds, lane,
                $"{bytes} bytes at {address} of {size} bytes of local memory");
        return lane * (long)size + (long)address;
    }

    /// <summary>ld.param: the arguments are one buffer, equal for all lanes.</summary>
    public static void LoadParam(Warp w, Instruction i)
    {
        fixed (byte* arguments = w.Block.Launch.Arguments)
        {
            int bytes = i.Size * i.Count, size = w.Block.Launch.Arguments.Length;
            Address.Fill(w, i.A, i.AddressIs64, i.Offset);
            for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
            {
                int lane = BitOperations.TrailingZeroCount(rest);
                ulong at = w.Addresses[lane];
                if (at >= DeviceMemory.ParamWindow) at -= DeviceMemory.ParamWindow;
                if (at > (ulong)size || (ulong)size - at < (ulong)bytes)
                    throw w.Fault(Check.OutOfBounds, lane,
                        $"{bytes} bytes at {at} of {size} bytes of arguments");
                Unsafe.CopyBlock(w.Staging + lane * bytes, arguments + at, (uint)bytes);
            }
        }
        Lanes.ToRegisters(w, i, w.Staging, w.Exec);
    }

    public static void LoadGeneric(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        // Addresses of parameters are the same in all lanes.
        if (w.Addresses[BitOperations.TrailingZeroCount(w.Exec)] - DeviceMemory.ParamWindow
            < DeviceMemory.WindowBytes)
        {
            LoadParam(w, i);
            return;
        }
        Split(w, out uint global, out uint shared, out uint local);
        if (global != 0) GlobalAccess.LoadAt(w, i, global);
        if (shared != 0) LoadSharedAt(w, i, shared);
        if (local != 0) LoadLocalAt(w, i, local);
    }

    public static void StoreGeneric(Warp w, Instruction i)
    {
        Address.Fill(w, i.A, i.AddressIs64, i.Offset);
        Split(w, out uint global, out uint shared, out uint local);
        if (global != 0) GlobalAccess.StoreAt(w, i, global);
        if (shared != 0) StoreSharedAt(w, i, shared);
        if (local != 0) StoreLocalAt(w, i, local);
    }

    /// <summary>Sorts lanes by the window of their generic address and makes window addresses
    /// relative.</summary>
    public static void Split(Warp w, out uint global, out uint shared, out uint local)
    {
        global = w.Exec;
        shared = local = 0;
        for (uint rest = w.Exec; rest != 0; rest &= rest - 1)
        {
            int lane = BitOperations.TrailingZeroCount(rest);
            ulong address = w.Addresses[lane];
            if (address - DeviceMemory.SharedWindow < DeviceMemory.WindowBytes)
            {
                shared |= 1u << lane;
                w.Addresses[lane] = address - DeviceMemory.SharedWindow;
            }
            else if (address - DeviceMemory.LocalWindow < DeviceMemory.WindowBytes)
            {
                local |= 1u << lane;
                w.Addresses[lane] = address - DeviceMemory.LocalWindow;
            }
        }
        global &= ~(shared | local);
    }
}
