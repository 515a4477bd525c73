using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// A model on a device, ready to run: what training, traces and generation start from. It has no
/// optimizer state; whoever trains makes the trained ranges first and hands them in.
/// </summary>
public sealed class LoadedModel : IDisposable
{
    private readonly OpenDevice _device;
    private readonly List<BatchUpload> _uploads = [];
    private RowFormat? _rows;

    private LoadedModel(OpenDevice device, Graph graph, ModelSpec spec, MiniCpmModel model)
    {
        (_device, Graph, Spec, Model) = (device, graph, spec, model);
    }

    public Device Device => _device.Device;

    /// <summary>The device in words.</summary>
    public string DeviceName => _device.Name;

    /// <summary>Once on each other thread that is to run the model: the driver's current context is
    /// a thread's own.</summary>
    public void MakeCurrent()
    {
        if (Device is CudaDevice gpu) gpu.Context.MakeCurrent();
    }

    public Graph Graph { get; }

    public ModelSpec Spec { get; }

    public MiniCpmModel Model { get; }

    /// <summary>How rows become tokens and patches; read when first asked for.</summary>
    /// <exception cref="InputException">
    /// The tokenizer or the chat template cannot be used.
    /// </exception>
    public RowFormat Rows => _rows ??= Spec.Rows();

    /// <inheritdoc cref="Rows"/>
    public Tokenizer Tokenizer => Rows.Tokenizer;

    /// <summary>Loads the weights of a checkpoint that matches the model.</summary>
    /// <param name="device">Taken over, and disposed of with the model.</param>
    /// <param name="spec">The model.</param>
    /// <param name="checkpoint">Its weights; not needed any more once this returns.</param>
    /// <param name="storage">Type of the weights.</param>
    /// <param name="options">What else is wanted of it; null for nothing.</param>
    public static LoadedModel Load(OpenDevice device, ModelSpec spec, Checkpoint checkpoint,
        DType storage, LoadOptions? options = null)
    {
        options ??= new LoadOptions();
        return Build(device, spec,
            graph => new ModelWeights(graph, checkpoint, storage, options), options.Recomputation);
    }

    /// <summary>
    /// The same without weights: its tensors have their places and no content, for a device that
    /// only counts.
    /// </summary>
    /// <param name="device">Taken over.</param>
    /// <param name="spec">The model.</param>
    /// <param name="storedAs">The type in which a frozen tensor is kept, by its name.</param>
    /// <param name="options">How it would be loaded.</param>
    public static LoadedModel Plan(OpenDevice device, ModelSpec spec,
        Func<string, DType> storedAs, LoadOptions options) => Build(
            device, spec, graph => new PlannedTensors(graph, spec, storedAs, options),
            options.Recomputation);

    /// <summary>Builds a model of tensors that come from anywhere.</summary>
    internal static LoadedModel Build(
        OpenDevice device, ModelSpec spec, Func<Graph, ITensorSource> tensors,
        Recomputation recomputation)
    {
        var graph = new Graph(device.Device);
        var scope = new ModuleScope(new ParameterTable.Builder(), tensors(graph));
        return new LoadedModel(
            device, graph, spec, spec.Family.Build(spec, scope, recomputation));
    }

    /// <summary>
    /// Brings a batch over and runs it: h[tokens, width] after the decoder's final norm. Over a
    /// cache the batch is the next tokens of the cache's sequences, and nothing is recorded.
    /// </summary>
    public Tensor Hidden(Batch batch, ITensorProbe? probe = null, KeyValueCache? cache = null)
    {
        if (cache is not null) return Model.Hidden(Graph, batch, Upload(0), cache);
        Model.Load(batch, Upload(0));
        return Model.Hidden(Graph, probe);
    }

    /// <summary>
    /// Loss of a batch, summed over its supervised tokens, left on the device; backward may follow.
    /// perRow: see <see cref="Decoder.Loss"/>.
    /// </summary>
    public Tensor Loss(Batch batch, Span<Tensor> perRow = default) =>
        Model.Loss(Graph, Hidden(batch), perRow);

    /// <summary>
    /// The losses of several batches that go through the model together, layer by layer: what they
    /// and backward come to is the same, and layers whose weights are streamed get them once.
    /// </summary>
    /// <param name="batches">The batches.</param>
    /// <param name="random">Key of the first one's random numbers; those that follow count up its
    /// step.</param>
    /// <param name="losses">Takes them.</param>
    /// <param name="noiseAlpha">See <see cref="Decoder.NoiseAlpha"/>.</param>
    public void Losses(ReadOnlySpan<Batch> batches, Randomness random, Span<Tensor> losses,
        double noiseAlpha = 0)
    {
        Model.NoiseAlpha = noiseAlpha;
        try
        {
            for (int i = batches.Length - 1; i >= 0; i--)
            {
                Device.Random = random with { Step = random.Step + (ulong)i };
                Model.Load(batches[i], Upload(i));
                losses[i] = Model.Embedded(Graph);
            }
        }
        finally
        {
            Model.NoiseAlpha = 0;
        }

        Model.Losses(Graph, losses);
    }

    public void Dispose() => _device.Dispose();

    private BatchUpload Upload(int number)
    {
        while (_uploads.Count <= number) _uploads.Add(new(Device, _uploads.Count));
        return _uploads[number];
    }
}
