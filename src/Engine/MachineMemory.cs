namespace MiniCpmNative.Engine;

/// <summary>What of the machine's memory is free.</summary>
internal static class MachineMemory
{
    /// <summary>
    /// Bytes that this process can take without others being swapped out: what Linux calls
    /// available, no more than its container, or elsewhere the machine, leaves it.
    /// </summary>
    public static long Free()
    {
        long left = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes - Environment.WorkingSet;
        return Math.Max(0, Math.Min(left, Available() ?? long.MaxValue));
    }

    // "MemAvailable:   12345678 kB" of /proc/meminfo.
    private static long? Available()
    {
        const string name = "MemAvailable:";
        try
        {
            string? line = File.ReadLines("/proc/meminfo")
                .FirstOrDefault(l => l.StartsWith(name, StringComparison.Ordinal));
            return long.TryParse(line?[name.Length..].Replace("kB", ""), out long kib)
                ? kib << 10 : null;
        }
        catch (Exception unknown) when (unknown is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}
