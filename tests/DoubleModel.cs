using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Tests;

/// <summary>
/// A model in F64 with every tensor trained: what activations and gradients are but for rounding,
/// under the names of a trace. Its operations are held to central differences and to PyTorch's.
/// </summary>
internal sealed class DoubleModel : ITensorProbe
{
    private readonly Device _device;
    private readonly Dictionary<int, string> _watched = [];
    private readonly Dictionary<string, double[]> _found = [];

    private DoubleModel(Device device) => _device = device;

    public static IReadOnlyDictionary<string, double[]> Run(string folder,
        Func<RowFormat, Batch> rows)
    {
        ModelSpec spec = ModelSpec.Read(folder);
        using var checkpoint = Checkpoint.Open(folder);
        var device = new CpuDevice(null, 1L << 30, DType.F64);
        TrainedTensors? tensors = null;
        using var model = LoadedModel.Build(
            new OpenDevice(device, "F64"), spec,
            graph => tensors = new TrainedTensors(graph, checkpoint.Get), Recomputation.None);
        Graph graph = model.Graph;
        var probe = new DoubleModel(device);
        Batch batch = rows(model.Rows);
        Tensor hidden = model.Hidden(batch, probe);
        graph.Recording = false;
        probe._found["logits"] = probe.Read(model.Model.Logits(graph, hidden));
        graph.Recording = true;
        Tensor loss = model.Model.Loss(graph, hidden, []);
        int labels = batch.LabelRows.Count;
        probe._found["loss"] = [probe.Read(loss)[0] / labels];
        graph.GradientVisitor = (variable, gradient) =>
        {
            if (probe._watched.TryGetValue(variable, out string? name))
                probe._found["grad." + name] = probe.Read(gradient);
        };
        graph.Backward(loss, 1.0 / labels);
        graph.ZeroUnreachedGradients();
        foreach (var (name, gradient) in tensors!.Gradients)
            probe._found["grad." + name] = probe.Read(gradient);
        graph.EndStep();
        return probe._found;
    }

    public void Visit(string name, Tensor tensor)
    {
        _found.Add(name, Read(tensor));
        if (tensor.Variable != 0) _watched[tensor.Variable] = name;
    }

    private double[] Read(Tensor tensor)
    {
        var values = new double[tensor.Shape.Count];
        _device.Read<double>(tensor, values);
        return values;
    }

    /// <summary>
    /// Every tensor whole, of the activations' type, with its gradient; parts of one are views.
    /// </summary>
    internal sealed class TrainedTensors(Graph graph, Func<string, StoredTensor> stored)
        : ITensorSource
    {
        private readonly Dictionary<string, Tensor> _values = [];

        public Dictionary<string, Tensor> Gradients { get; } = [];

        public Tensor Vector(string name, int begin, int count) =>
            Part(name, 1, begin, count, vector: true);

        public Tensor Small(string name) => Vector(name, 0, (int)stored(name).Count);

        public Tensor Matrix(string name, int begin, int rows, int cols) =>
            Part(name, cols, begin, rows);

        public Tensor Table(string name, bool isLookedUp)
        {
            Shape shape = stored(name).Shape;
            return Part(name, shape.Cols, 0, (int)shape.Rows);
        }

        public Tensor Original(string name) => Tensor.None;

        public StreamedBlock? BeginBlock(ModelPart part) => null;

        public bool IsPacked(string weight) => false;

        public void Together(string first, int rows, int cols)
        {
        }

        public Projection Projection(string? module, string weight, int begin, int rows,
            Tensor bias) =>
            new(new DenseWeight(Matrix(weight, begin, rows, stored(weight).Shape.Cols)), bias);

        private Tensor Part(string name, int cols, int begin, int count, bool vector = false)
        {
            StoredTensor whole = stored(name);
            int all = (int)(whole.Count / cols);
            Shape shape = vector ? new Shape(all) : new Shape(all, cols);
            var spec = new Spec(graph.Device.Activations, shape);
            if (!_values.TryGetValue(name, out Tensor value))
            {
                _values[name] = value = graph.Device.Allocate(spec, name);
                graph.Device.WriteFloats(value, whole.ToFloats());
                Gradients[name] = graph.Device.Allocate(spec, name);
            }

            return graph.Parameter(
                value.Slice(begin, count), Gradients[name].Slice(begin, count));
        }
    }
}
