using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// A model on a device, ready to train or evaluate:
/// what a configuration loads before the first row.
/// </summary>
public sealed class TrainingModel : IDisposable
{
    private readonly OpenDevice _device;

    private TrainingModel(OpenDevice device, Graph graph, ModelSpec spec, TrainedParts parts,
        Trainables trainables, MiniCpmModel model)
    {
        (_device, Graph, Spec, Parts, Trainables, Model) =
            (device, graph, spec, parts, trainables, model);
        Batch = new BatchTensors(Device, spec.Vision, spec.Resampler, spec.Decoder);
    }

    public Device Device => _device.Device;

    /// <summary>The device in words.</summary>
    public string DeviceName => _device.Name;

    public Graph Graph { get; }

    public ModelSpec Spec { get; }

    public TrainedParts Parts { get; }

    public Trainables Trainables { get; }

    public MiniCpmModel Model { get; }

    /// <summary>The batch that is on the device.</summary>
    public BatchTensors Batch { get; }

    /// <summary>Trainable and frozen numbers together, adapters included.</summary>
    public long TotalParameters => Spec.Parameters.All.Sum(p => p.Shape.Count)
        + Parts.Adapters.List.Sum(a => (long)a.Rank * (a.Inputs + a.Outputs));

    /// <summary>Storage type of weights: fp16, bf16, else F32, as the official flags say.</summary>
    public static DType StorageOf(TrainArguments arguments) =>
        arguments.Fp16 ? DType.F16 : arguments.Bf16 ? DType.BF16 : DType.F32;

    /// <summary>Storage type of AdamW's moments.</summary>
    public static DType MomentsOf(TrainArguments arguments) =>
        arguments.Optim == OptimizerKind.AdamwBf16 ? DType.BF16 : DType.F32;

    /// <param name="arguments">Say what is loaded where, and what of it is trained.</param>
    /// <param name="devices">Opens the device; null takes the machine's.</param>
    /// <param name="say">Takes a line on the choice of the device.</param>
    /// <exception cref="InputException">The model, the adapter, the device or what is to be trained
    /// is unusable.</exception>
    public static TrainingModel Open(
        TrainArguments arguments, DeviceSource? devices = null, Action<string>? say = null)
    {
        string folder = arguments.ModelNameOrPath!;
        ModelSpec spec = ModelSpec.Read(folder);
        using Checkpoint checkpoint = Checkpoint.Open(folder);
        checkpoint.MustMatch(spec.Parameters);
        using AdapterFile? start = arguments.LoraWeightPath is { } path
            ? AdapterFile.Open(path) : null;
        // An adapter to start from brings its own rank, scale and targets.
        AdapterConfig? adapter = start is null
            ? TrainedParts.AdapterOf(arguments, spec)
            : start.Config with { BaseModel = folder, ModelClass = spec.ModelClass };
        DType storage = StorageOf(arguments);
        TrainedParts parts = TrainedParts.Choose(spec, arguments, adapter, storage);
        foreach (StoredTensor tensor in checkpoint.Tensors) tensor.MustBeFinite(storage);

        OpenDevice device = (devices ?? DeviceSource.Default).Open(arguments, say);
        try
        {
            var graph = new Graph(device.Device);
            var trainables = new Trainables(device.Device, parts.Tensors, MomentsOf(arguments));
            var weights = new ModelWeights(graph, checkpoint, trainables, parts.Adapters, storage);
            var model = new TrainingModel(
                device, graph, spec, parts, trainables,
                new MiniCpmModel(spec, weights, arguments.GradientCheckpointing));
            foreach (Trainable tensor in trainables.List)
                if (checkpoint.Find(tensor.Name) is { } stored)
                    trainables.Write(tensor.Name, stored.ToFloats());
            parts.Adapters.Initialise(trainables, (ulong)arguments.Seed);
            if (start is not null) model.CopyFrom(start);
            return model;
        }
        catch
        {
            device.Dispose();
            throw;
        }
    }

    /// <summary>Takes the trained values of an adapter of the same layout.</summary>
    /// <exception cref="InputException">Its tensors are not those that are trained.</exception>
    public void CopyFrom(AdapterFile adapter)
    {
        AdapterConfig its = adapter.Config;
        if (Parts.Config is { } own && (its.Rank, its.Alpha) != (own.Rank, own.Alpha))
            throw new InputException(
                $"{adapter.Directory}: was made with lora_r {its.Rank} and lora_alpha "
                + $"{its.Alpha}, this run has {own.Rank} and {own.Alpha}");
        foreach (var (name, stored) in adapter.Match(Spec.Parameters))
        {
            if (!Trainables.Contains(name))
                throw new InputException($"{adapter.Directory}: {name} is not trained in this run");
            stored.MustBeFinite(Trainables.Value(name).Type);
            Trainables.Write(name, stored.ToFloats());
        }
    }

    /// <summary>A tensor of this device as it goes into a file, in its own type.</summary>
    public TensorToSave ToSave(string name, Tensor tensor) =>
        new(name, tensor.Type, tensor.Shape, stream =>
        {
            // In pieces: an array cannot hold the largest tensors.
            const int Piece = 16 << 20;
            long all = tensor.Spec.Bytes;
            var bytes = new byte[Math.Min(Piece, all)];
            for (long done = 0; done < all; done += Piece)
            {
                int count = (int)Math.Min(Piece, all - done);
                Device.Read(
                    new Tensor(tensor.Data + (nint)done, new Spec(DType.U8, new Shape(count))),
                    bytes.AsSpan(0, count));
                stream.Write(bytes, 0, count);
            }
        });

    /// <summary>
    /// Loss of a batch, summed over its supervised tokens, left on the device; backward may follow.
    /// perRow: see <see cref="MiniCpmModel.Loss"/>.
    /// </summary>
    public Tensor Loss(Batch batch, Span<Tensor> perRow = default)
    {
        Batch.Load(batch);
        return Model.Loss(Graph, Model.Hidden(Graph, Batch), Batch, perRow);
    }

    public void Dispose() => _device.Dispose();
}
