namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>An event: how often it was recorded, and how many of those records have run.</summary>
internal sealed class EmulatedEvent
{
    public int Recorded { get; set; }
    public int Reached { get; set; }
    public long Ticks { get; set; }
}

/// <summary>A queue of work; an item runs when its condition holds (the event it waits for has
/// come).</summary>
internal sealed class EmulatedStream(nint handle)
{
    public nint Handle { get; } = handle;
    public Queue<(Func<bool>? Ready, Action Work)> Work { get; } = new();
}

/// <summary>
/// Runs queued work only when somebody waits for it, and then one item at a time from a stream
/// chosen by the seed: every order that events allow can happen, and the host sees copies at the
/// last moment.
/// </summary>
internal sealed class Scheduler(int seed)
{
    private readonly Random? _random = seed == 0 ? null : new(seed);
    private readonly List<EmulatedStream> _streams = [];

    public void Add(EmulatedStream stream) => _streams.Add(stream);

    public void Remove(EmulatedStream stream)
    {
        RunUntil(() => stream.Work.Count == 0);
        _streams.Remove(stream);
    }

    /// <summary>Runs work until the condition holds; false when nothing can run any more.</summary>
    public bool RunUntil(Func<bool> done)
    {
        while (!done())
        {
            var ready = _streams.FindAll(s => s.Work.TryPeek(out var head)
                && (head.Ready?.Invoke() ?? true));
            if (ready.Count == 0) return false;
            var stream = ready[_random?.Next(ready.Count) ?? 0];
            stream.Work.Dequeue().Work();
        }
        return true;
    }

    public bool IsIdle => _streams.TrueForAll(s => s.Work.Count == 0);
}
