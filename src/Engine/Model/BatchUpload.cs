using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A part of the model with inputs of its own that follow from the rows of a batch: position
/// buckets, coordinates, rotary tables.
/// </summary>
public interface IBatchInput
{
    /// <summary>How many numbers, of 4 bytes at most, it brings in at most 10 tensors.</summary>
    long Count(Batch batch);

    /// <summary>
    /// Brings them over; the batch may change once this returns. Called before the first operation
    /// on them; by an upload of the same number again only when the last one has been called.
    /// </summary>
    void Load(Batch batch, BatchUpload upload);
}

/// <summary>
/// Brings the numbers of a batch onto the device. While the device computes on one batch, the next
/// may come over (<see cref="InputMemory"/>).
/// </summary>
/// <param name="device">Where to.</param>
/// <param name="number">Of batches that are on the device together, from 0.</param>
public sealed class BatchUpload(Device device, int number = 0)
{
    private const int TensorsOfAPart = 10;

    private readonly InputMemory _input = device.NewInput();
    private float[] _row = [];

    /// <summary>Which of the batches that are on the device together it brings.</summary>
    public int Number => number;

    /// <summary>Key of the batch's random numbers, as the device has it now.</summary>
    public Randomness Random => device.Random;

    /// <summary>A buffer for numbers on their way; whoever uses it clears it first.</summary>
    public Growing<int> Scratch { get; } = new();

    /// <summary>Loads each part's inputs, in one transfer where the device has one.</summary>
    public void Run(Batch batch, ReadOnlySpan<IBatchInput> parts)
    {
        long bytes = 0;
        foreach (IBatchInput part in parts)
            bytes += (4 * part.Count(batch)) + (TensorsOfAPart * InputMemory.Alignment);
        _input.Begin(bytes);
        foreach (IBatchInput part in parts) part.Load(batch, this);
        _input.Send();
    }

    public Tensor Ints(ReadOnlySpan<int> values, string name) =>
        _input.Push(DType.I32, new Shape(values.Length), name, values);

    /// <summary>
    /// The lists of attention's tiles over sequences that start there, of queries and of keys; see
    /// <see cref="AttentionTiles"/>. They count as <see cref="TileNumbers"/>.
    /// </summary>
    public (Tensor OfQueries, Tensor OfKeys) Tiles(
        ReadOnlySpan<int> startsQ, ReadOnlySpan<int> startsK, bool causal)
    {
        return (Push(startsQ, startsQ, startsK, ofKeys: false, "query tiles"),
            Push(startsK, startsQ, startsK, ofKeys: true, "key tiles"));

        unsafe Tensor Push(ReadOnlySpan<int> of, ReadOnlySpan<int> q, ReadOnlySpan<int> k,
            bool ofKeys, string name)
        {
            var shape = new Shape(AttentionTiles.Count(of), AttentionTiles.Fields);
            Tensor list = _input.Push(new Spec(DType.I32, shape), name, out nint host);
            AttentionTiles.Fill(
                new Span<int>((void*)host, (int)shape.Count), q, k, causal, ofKeys);
            return list;
        }
    }

    /// <summary>Numbers of both lists of tiles, at most.</summary>
    public static long TileNumbers(long queries, long keys, int sequences) =>
        AttentionTiles.Fields
        * (((queries + keys) / AttentionTiles.Rows) + (2L * sequences));

    /// <summary>Numbers in F32, whatever the activations.</summary>
    public Tensor Floats(ReadOnlySpan<float> values, string name) => Push(
        new Spec(device.Activations.Statistics(), new Shape(values.Length)), values, name);

    /// <summary>The same number so many times, in F32.</summary>
    public unsafe Tensor Constant(float value, int count, string name)
    {
        var spec = new Spec(device.Activations.Statistics(), new Shape(count));
        Tensor tensor = _input.Push(spec, name, out nint host);
        if (spec.Type == DType.F64) new Span<double>((void*)host, count).Fill(value);
        else new Span<float>((void*)host, count).Fill(value);
        return tensor;
    }

    /// <summary>
    /// Noise of x[tokens, width], uniform in +-size / sqrt(tokens of its sequence * width); drawn
    /// here, so that each device has the same.
    /// </summary>
    public unsafe Tensor Noise(ReadOnlySpan<int> starts, int width, double size)
    {
        var spec = new Spec(device.Activations, new Shape(starts[^1], width));
        Tensor noise = _input.Push(spec, "embedding noise", out nint host);
        if (_row.Length != width) _row = new float[width];
        for (int i = 1; i < starts.Length; i++)
        {
            var largest = (float)(size / Math.Sqrt((double)(starts[i] - starts[i - 1]) * width));
            for (int t = starts[i - 1]; t < starts[i]; t++)
            {
                Philox.Uniform(Random, t, largest, _row);
                fixed (float* from = _row)
                    FloatBits.Narrow(
                        from, (void*)(host + (nint)(spec.Bytes / starts[^1] * t)), spec.Type,
                        width);
            }
        }

        return noise;
    }

    /// <summary>Patches of so many numbers each, rounded to the activations' type.</summary>
    public Tensor Patches(ReadOnlySpan<float> pixels, int length)
    {
        var spec = new Spec(device.Activations, new Shape(pixels.Length / length, length));
        return pixels.Length == spec.Shape.Count ? Push(spec, pixels, "patches")
            : throw new ShapeException($"{pixels.Length} pixels for patches {spec}");
    }

    /// <summary>
    /// A table that stays on the device, F32 whatever the activations: sines of large angles need
    /// it. Tables grow rarely, by doubling; the smaller one that this replaces stays allocated.
    /// </summary>
    public Tensor Table(float[] values, int rows, string name)
    {
        var shape = new Shape(rows, values.Length / rows);
        Tensor table = device.Allocate(new Spec(device.Activations.Statistics(), shape), name);
        device.WriteFloats(table, values);
        return table;
    }

    private unsafe Tensor Push(Spec spec, ReadOnlySpan<float> values, string name)
    {
        Tensor tensor = _input.Push(spec, name, out nint host);
        fixed (float* from = values) FloatBits.Narrow(from, (void*)host, spec.Type, values.Length);
        return tensor;
    }
}
