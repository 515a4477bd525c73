using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <content>Tensors that are not kept for backward, and made again where it reads them.</content>
public sealed partial class Graph
{
    /// <summary>
    /// As Run; backward does without the result, or makes it again. <see cref="Drop"/> ends its
    /// life once the operations that read it have run.
    /// </summary>
    public Tensor RunFleeting(Op op, params ReadOnlySpan<Tensor> inputs) =>
        Run(op, keepSaved: false, Life.Fleeting, inputs);

    /// <summary>
    /// As Run, for the last operation of a block, whose result nothing inside the block reads: a
    /// block that runs again in backward leaves it undefined.
    /// </summary>
    public Tensor RunLast(Op op, params ReadOnlySpan<Tensor> inputs) =>
        Run(op, keepSaved: false, _again ? Life.Unread : Life.Kept, inputs);

    /// <summary>Gives back the memory of a fleeting tensor; nothing for others.</summary>
    public void Drop(in Tensor tensor)
    {
        ref Variable variable = ref _variables[Root(tensor.Variable)];
        if (!variable.Value.Exists) return;
        _pool.Return(variable.Value);
        variable.Value = Tensor.None;
    }

    // The tensor where it lies, made first where it is not there.
    private Tensor Present(in Tensor tensor)
    {
        Make(tensor);
        return Current(tensor);
    }

    // Makes a fleeting tensor that is not there by running its operation again, and those that
    // this reads before.
    private void Make(in Tensor tensor)
    {
        int root = Root(tensor.Variable), maker = _variables[root].Maker;
        if (maker == 0 || _variables[root].Value.Exists) return;
        Node node = _nodes[maker - 1];
        Span<Tensor> inputs = _tensors.AsSpan(node.FirstTensor, node.Inputs);
        foreach (ref Tensor input in inputs) input = Present(input);
        Tensor value = _pool.Take(node.Output.Spec);
        _variables[root].Value = value;
        Device.Forward(node.Op!, new OpCall(
            inputs, value, _tensors.AsSpan(node.FirstTensor + node.Inputs, node.Saved),
            recorded: true));
    }

    // The tensor where it lies now, in the shape in which it is used here.
    private Tensor Current(in Tensor tensor)
    {
        ref Variable variable = ref _variables[Root(tensor.Variable)];
        return variable.Value.Exists
            ? tensor with { Data = variable.Value.Data + _variables[tensor.Variable].Offset }
            : tensor;
    }

    // The variable of the output that this one is a part of, or itself.
    private int Root(int variable) =>
        _variables[variable].Whole is { Exists: true } whole ? whole.Variable : variable;
}
