namespace MiniCpmNative.Kernels;

/// <summary>
/// Memory of one training step as a stack: forward pushes tensors, backward pops back to the mark
/// that stood before them. A slot with a serial number per tensor lets a read after a pop be
/// noticed. The arena hands out addresses only; whose memory they are (host, GPU, none in a dry
/// run) is the device's affair. From the far end grows what does not die in stack order;
/// both ends share the room between.
/// </summary>
/// <param name="reserve">Called when the first tensor is pushed, once the model has its memory:
/// where the arena starts and its bytes.</param>
public sealed class Arena(Func<(nint Start, long Capacity)> reserve)
{
    private const long Alignment = 256;

    private Lazy<(nint Start, long Capacity)> _room = new(reserve);
    private Slot[] _slots = new Slot[256];
    private int _count;
    private int _serial;
    private long _top, _far;

    public long Capacity => _room.Value.Capacity;

    /// <summary>Bytes of the stack in use.</summary>
    public long Used => _top;

    /// <summary>Most bytes of the stack ever in use.</summary>
    public long Peak { get; private set; }

    /// <summary>Most bytes ever taken from the far end.</summary>
    public long FarPeak { get; private set; }

    /// <summary>Most bytes of both ever in use together: what the arena must have.</summary>
    public long Needed { get; private set; }

    /// <summary>What was being made when the most was needed.</summary>
    public string Fullest { get; private set; } = "";

    /// <summary>Bytes that are taken from the device: none before the first tensor.</summary>
    public long Reserved => _room.IsValueCreated ? Capacity : 0;

    public bool IsEmpty => _count == 0;

    /// <summary>Room for a tensor; its content is undefined.</summary>
    /// <exception cref="DeviceMemoryException">The arena is full.</exception>
    public Tensor Push(Spec spec, string name)
    {
        long bytes = (spec.Bytes + Alignment - 1) / Alignment * Alignment;
        if (bytes > Capacity - _far - _top) throw Full(spec, name, bytes);
        if (_count == _slots.Length) Array.Resize(ref _slots, _count * 2);
        int serial = ++_serial;
        _slots[_count] = new Slot(_top, bytes, serial, name, spec);
        var tensor = new Tensor(_room.Value.Start + (nint)_top, spec, ++_count, serial);
        _top += bytes;
        Peak = Math.Max(Peak, _top);
        Measure(name);
        return tensor;
    }

    /// <summary>Room at the far end for a tensor, until <see cref="PopFar"/>; its content is
    /// undefined.</summary>
    /// <exception cref="DeviceMemoryException">The arena is full.</exception>
    public Tensor PushFar(Spec spec, string name)
    {
        long bytes = Math.Max(Alignment, (spec.Bytes + Alignment - 1) / Alignment * Alignment);
        if (bytes > Capacity - _far - _top) throw Full(spec, name, bytes);
        _far += bytes;
        FarPeak = Math.Max(FarPeak, _far);
        Measure(name);
        var (start, capacity) = _room.Value;
        return new Tensor(start + (nint)(capacity / Alignment * Alignment - _far), spec);
    }

    /// <summary>Ends the life of everything at the far end.</summary>
    public void PopFar() => _far = 0;

    /// <summary>Forgets what was needed so far.</summary>
    public void ResetNeeded() => (Needed, Fullest) = (_top + _far, "");

    /// <summary>Gives its memory back: the next tensor takes some anew.</summary>
    public void Release()
    {
        if (_count > 0 || _far > 0)
            throw new InvalidOperationException("an arena with tensors in it is not released");
        _room = new(reserve);
    }

    public ArenaMark Mark() => new(_count, _top);

    /// <summary>
    /// The mark in front of a tensor that is the last one below a mark; else that mark.
    /// </summary>
    public ArenaMark Before(in Tensor tensor, ArenaMark mark) =>
        tensor.Slot > 0 && tensor.Slot == mark.Slots
            && _slots[tensor.Slot - 1] is var slot && slot.Spec.Bytes == tensor.Spec.Bytes
            ? new(mark.Slots - 1, slot.Offset) : mark;

    /// <summary>Ends the life of everything pushed since the mark.</summary>
    public void Pop(ArenaMark mark)
    {
        if (mark.Slots > _count)
            throw new InvalidOperationException("arena popped to a mark that is gone already");
        (_count, _top) = (mark.Slots, mark.Top);
    }

    /// <exception cref="StaleTensorException">The tensor's scope has ended.</exception>
    public void Check(in Tensor tensor)
    {
        if (tensor.Slot == 0) return;
        if (tensor.Slot > _count || _slots[tensor.Slot - 1].Serial != tensor.Serial)
        {
            string name = tensor.Slot <= _slots.Length ? _slots[tensor.Slot - 1].Name ?? "?" : "?";
            throw new StaleTensorException(
                $"{tensor.Spec} was read after its scope ended; its place was last used by {name}");
        }
    }

    private void Measure(string name)
    {
        if (_top + _far > Needed) (Needed, Fullest) = (_top + _far, name);
    }

    private DeviceMemoryException Full(Spec spec, string name, long bytes)
    {
        var largest = _slots.Take(_count).OrderByDescending(s => s.Bytes).Take(5)
            .Select(s => $"{s.Name} {s.Spec} {s.Bytes / 1048576.0:F1} MiB");
        return new($"out of memory: {name} {spec} needs {bytes / 1048576.0:F1} MiB, "
            + $"{(Capacity - _far - _top) / 1048576.0:F1} of {Capacity / 1048576.0:F1} MiB are "
            + $"free; largest: {string.Join(", ", largest)}");
    }

    private readonly record struct Slot(long Offset, long Bytes, int Serial, string Name,
        Spec Spec);
}

/// <summary>A height of the arena's stack.</summary>
public readonly record struct ArenaMark(int Slots, long Top);
