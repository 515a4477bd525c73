namespace MiniCpmNative.Engine.Data.Images;

/// <summary>
/// Bytes of pictures that are too large for the shared pool. A collector that is in no hurry would
/// let one lie beside the next; so they are used again, and what no longer serves is collected
/// before another is made.
/// </summary>
internal static class LargeBuffers
{
    private static readonly Lock s_turn = new();
    private static readonly List<byte[]> s_unused = [];
    private static long s_unusedBytes;
    private static bool s_hasDropped;

    public static byte[] Rent(int needed)
    {
        lock (s_turn)
        {
            int at = s_unused.FindIndex(bytes => bytes.Length >= needed);
            if (at >= 0)
            {
                byte[] found = s_unused[at];
                s_unused.RemoveAt(at);
                s_unusedBytes -= found.Length;
                return found;
            }

            s_hasDropped |= s_unused.Count > 0;
            s_unused.Clear();
            s_unusedBytes = 0;
            if (s_hasDropped)
                GC.Collect(
                    GC.MaxGeneration, GCCollectionMode.Aggressive, blocking: true,
                    compacting: true);
            s_hasDropped = false;
        }

        return GC.AllocateUninitializedArray<byte>(needed);
    }

    public static void Return(byte[] bytes)
    {
        lock (s_turn)
        {
            if (s_unusedBytes + bytes.Length > PictureMemory.Limit / 2)
            {
                s_hasDropped = true;
                return;
            }

            s_unused.Add(bytes);
            s_unusedBytes += bytes.Length;
        }
    }
}
