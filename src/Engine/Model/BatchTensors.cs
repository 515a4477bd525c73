using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A batch on the device, with what follows from it: position buckets of the patches, coordinates
/// for the resampler, rotary tables. One instance is loaded again for each batch; while the device
/// computes on one, the next may come over (<see cref="InputMemory"/>).
/// </summary>
public sealed class BatchTensors(
    Device device, VisionSpec vision, ResamplerSpec resampler, DecoderSpec decoder)
{
    private readonly InputMemory _input = device.NewInput();
    private readonly Growing<int> _ints = new();
    private readonly int _queries = resampler.Queries;
    private readonly int _patchSize = vision.Channels * vision.PatchSize * vision.PatchSize;

    public int Pictures { get; private set; }

    /// <summary>I32[tokens].</summary>
    public Tensor Tokens { get; private set; }

    /// <summary>I32[tokens].</summary>
    public Tensor Positions { get; private set; }

    /// <summary>I32[rows + 1].</summary>
    public Tensor SequenceStarts { get; private set; }

    /// <summary>I32[labels].</summary>
    public Tensor LabelRows { get; private set; }

    /// <summary>I32[labels].</summary>
    public Tensor Targets { get; private set; }

    /// <summary>[patches, channels * p * p], in the activations' type.</summary>
    public Tensor Patches { get; private set; }

    /// <summary>I32[patches]: rows of the vision tower's position table.</summary>
    public Tensor PatchPositions { get; private set; }

    /// <summary>I32[pictures + 1], in patches.</summary>
    public Tensor PictureStarts { get; private set; }

    /// <summary>I32[pictures + 1], in queries.</summary>
    public Tensor QueryStarts { get; private set; }

    /// <summary>I32[pictures * queries]: 0..queries-1 for each picture.</summary>
    public Tensor QueryIds { get; private set; }

    /// <summary>I32[2 * patches]: column, row of each patch.</summary>
    public Tensor CoordinateIds { get; private set; }

    /// <summary>F32[coordinates, width / 2]: sines and cosines of one coordinate.</summary>
    public Tensor Coordinates { get; private set; }

    /// <summary>I32[slots]: tokens that are picture features.</summary>
    public Tensor Slots { get; private set; }

    /// <summary>I32[slots], only when the slots do not simply take all features in order.</summary>
    public Tensor FeatureIds { get; private set; }

    /// <summary>F32[positions, headDim / 2].</summary>
    public Tensor RopeCos { get; private set; }

    /// <summary>F32[positions, headDim / 2].</summary>
    public Tensor RopeSin { get; private set; }

    /// <summary>
    /// Brings a batch over, which may change once this returns. Call it when the arena is empty,
    /// before the first operation.
    /// </summary>
    public void Load(Batch batch)
    {
        Pictures = batch.Grids.Count / 2;
        _input.Begin(Bytes(batch));
        Tokens = Upload(batch.Tokens.Span, "tokens");
        Positions = Upload(batch.Positions.Span, "positions");
        SequenceStarts = Upload(batch.SequenceStarts.Span, "sequence starts");
        LabelRows = Upload(batch.LabelRows.Span, "label rows");
        Targets = Upload(batch.Targets.Span, "targets");
        Slots = Upload(batch.Slots.Span, "slots");
        LoadRope(batch);
        if (Pictures > 0) LoadPictures(batch);
        _input.Send();
    }

    // At most what Load gives room to; a padding for each tensor.
    private long Bytes(Batch batch)
    {
        const int Tensors = 16;
        long patches = Pictures == 0 ? 0 : batch.PictureStarts[Pictures];
        long ints = batch.Tokens.Count + batch.Positions.Count + batch.SequenceStarts.Count
            + batch.LabelRows.Count + batch.Targets.Count + batch.Slots.Count
            + batch.SlotFeatures.Count
            + (2L * (Pictures + 1)) + ((long)Pictures * _queries) + (3 * patches);
        return (4 * ints) + (patches * _patchSize * device.Activations.Size())
            + (Tensors * InputMemory.Alignment);
    }

    private unsafe void LoadPictures(Batch batch)
    {
        int patches = batch.PictureStarts[Pictures];
        var spec = new Spec(device.Activations, new Shape(patches, _patchSize));
        if (batch.Patches.Count != spec.Shape.Count)
            throw new ShapeException($"{batch.Patches.Count} pixels for patches {spec}");
        Patches = _input.Push(spec, "patches", out nint pixels);
        fixed (float* from = batch.Patches.Span)
            FloatBits.Narrow(from, (void*)pixels, spec.Type, batch.Patches.Count);
        PictureStarts = Upload(batch.PictureStarts.Span, "picture starts");
        LoadGrids(batch);

        _ints.Clear();
        for (int i = 0; i <= Pictures; i++) _ints.Add(i * _queries);
        QueryStarts = Upload(_ints.Span, "query starts");
        _ints.Clear();
        for (int i = 0; i < Pictures * _queries; i++) _ints.Add(i % _queries);
        QueryIds = Upload(_ints.Span, "query ids");

        bool allInOrder = batch.SlotFeatures.Count == Pictures * _queries;
        for (int i = 0; i < batch.SlotFeatures.Count && allInOrder; i++)
            allInOrder = batch.SlotFeatures[i] == i;
        FeatureIds = allInOrder ? Tensor.None : Upload(batch.SlotFeatures.Span, "feature ids");
    }

    private void LoadGrids(Batch batch)
    {
        int side = vision.PositionsPerSide, largest = 1;
        _ints.Clear();
        for (int i = 0; i < Pictures; i++)
        {
            int rows = batch.Grids[2 * i], cols = batch.Grids[(2 * i) + 1];
            largest = Math.Max(largest, Math.Max(rows, cols));
            PositionBuckets.Write(rows, cols, side, _ints.Extend(rows * cols));
        }

        PatchPositions = Upload(_ints.Span, "patch positions");
        _ints.Clear();
        for (int i = 0; i < Pictures; i++)
        {
            int rows = batch.Grids[2 * i], cols = batch.Grids[(2 * i) + 1];
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < cols; c++)
                {
                    _ints.Add(c);
                    _ints.Add(r);
                }
        }

        CoordinateIds = Upload(_ints.Span, "coordinates");
        if (Coordinates.Exists && Coordinates.Shape[0] >= largest) return;
        int count = Math.Max(largest, Coordinates.Exists ? 2 * Coordinates.Shape[0] : side);
        Coordinates =
            Table(SinCos2D.Coordinates(count, resampler.HiddenSize), count, "coordinates");
    }

    private void LoadRope(Batch batch)
    {
        int longest = 1;
        for (int i = 1; i < batch.SequenceStarts.Count; i++)
            longest = Math.Max(longest, batch.SequenceStarts[i] - batch.SequenceStarts[i - 1]);
        if (RopeCos.Exists && RopeCos.Shape[0] >= longest) return;
        int count = Math.Max(longest, RopeCos.Exists ? 2 * RopeCos.Shape[0] : 2048);
        var (cos, sin) = decoder.RopeTable(count);
        (RopeCos, RopeSin) = (Table(cos, count, "rope cos"), Table(sin, count, "rope sin"));
    }

    /// <summary>
    /// Tables are F32 whatever the activations: sines of large angles need it. They grow rarely, by
    /// doubling; the smaller one they replace stays allocated.
    /// </summary>
    private Tensor Table(float[] values, int rows, string name)
    {
        var shape = new Shape(rows, values.Length / rows);
        Tensor table = device.Allocate(new Spec(device.Activations.Statistics(), shape), name);
        device.WriteFloats(table, values);
        return table;
    }

    private Tensor Upload(ReadOnlySpan<int> values, string name) =>
        _input.Push(DType.I32, new Shape(values.Length), name, values);
}
