using MiniCpmNative.Autograd;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Tensors that take their place on a device and have no content: of a model whose run is only
/// counted, whether its weights are there or not.
/// </summary>
/// <param name="graph">The tape.</param>
/// <param name="spec">The model.</param>
/// <param name="storedAs">The type in which the run keeps a frozen tensor, by its name.</param>
/// <param name="options">What is trained, and how the rest would be kept.</param>
internal sealed class PlannedTensors(
    Graph graph, ModelSpec spec, Func<string, DType> storedAs, LoadOptions options)
    : ModelTensors(graph, options)
{
    protected override bool HasContent => false;

    protected override Weight? OtherKind(string weight, int begin, int rows) =>
        Kind?.Plan(Device, weight, begin, rows);

    protected override Shape ShapeOf(string name) => spec.Parameters.Find(name)!.Shape;

    protected override Tensor FrozenVector(string name, int begin, int count) =>
        Device.Allocate(new Spec(Device.Activations.Statistics(), new Shape(count)), name);

    protected override Tensor FrozenSquares(string name, int begin, int rows) =>
        FrozenVector(name, begin, rows);

    protected override unsafe Tensor FrozenMatrix(string name, int begin, int rows, int cols) =>
        Device.Pack(storedAs(name), rows, cols, null, name);

    protected override Tensor FrozenTable(string name, bool inHost) =>
        Device.AllocateIn(inHost, new Spec(storedAs(name), ShapeOf(name)), name);
}
