using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <content>Taking the tape down: gradients, and what they are given from.</content>
public sealed partial class Graph
{
    private void Unwind(int bottom)
    {
        while (_nodeCount > bottom)
        {
            Node node = _nodes[--_nodeCount];
            Variable variable = _variables[node.Output.Variable];
            if (variable.Written)
            {
                Device.Random = node.Random;
                FillParts(node.Output.Variable, variable.Parts);
                Tensor gradient = Seen(variable.Gradient, node.Output.Shape);
                GradientVisitor?.Invoke(node.Output.Variable, gradient);
                bool kept = node.Again is not null
                    ? Replay(node, variable)
                    : Differentiate(node, variable, gradient);
                if (!kept && !variable.Borrowed) _pool.Return(variable.Gradient);
            }

            Drop(node.Output);
            Device.Step.Pop(node.Mark);
            _tensorCount = node.FirstTensor;
            _variableCount = node.Output.Variable;
        }
    }

    // Whether the gradient's memory is another variable's now.
    private bool Differentiate(in Node node, in Variable variable, Tensor outputGradient)
    {
        Span<Tensor> inputs = _tensors.AsSpan(node.FirstTensor, node.Inputs);
        int owner = HandOver(node, variable, inputs);
        bool wanted = false;
        for (int i = 0; i < inputs.Length; i++)
        {
            int at = inputs[i].Variable;
            bool handed = at != 0 && (at == owner || _variables[at].Borrowed);
            wanted |= at != 0 && !handed;
            _targets[i] = at == 0 || handed ? GradientTarget.None : Wanted(inputs[i]);
        }

        if (!wanted) return owner != 0;
        for (int i = 0; i < inputs.Length; i++) _trained[i] = inputs[i].Variable != 0;
        for (int i = 0; i < inputs.Length; i++)
            if (node.Op!.BackwardReads(i, _trained)) inputs[i] = Present(inputs[i]);

        Device.Backward(node.Op!, new OpCall(
            inputs, node.Output, _tensors.AsSpan(node.FirstTensor + node.Inputs, node.Saved),
            recorded: true, outputGradient, _targets.AsSpan(0, inputs.Length)));
        return owner != 0;
    }

    // Gives the memory of an output's gradient to an input whose gradient is the same numbers, and
    // lends it to the one whose operation is undone next, which only reads it and is done with it
    // before anything is added. The owner; 0 where there is none.
    private int HandOver(in Node node, in Variable variable, ReadOnlySpan<Tensor> inputs)
    {
        int owner = 0, next = 0;
        if (variable.Borrowed) return 0;
        for (int i = 0; i < inputs.Length; i++)
        {
            int at = inputs[i].Variable;
            if (at <= _parameterCount || _variables[at].Written || _variables[at].Whole.Exists
                || !node.Op!.PassesGradient(i) || inputs[i].Type != variable.Gradient.Type)
                continue;
            if (next == 0 && _nodeCount > 0 && _nodes[_nodeCount - 1].Output.Variable == at)
                next = at;
            else if (owner == 0) owner = at;
        }

        if (owner == 0) (owner, next) = (next, 0);
        if (owner != 0) Give(owner, variable.Gradient, borrowed: false);
        if (next != 0 && !Reads(_nodes[_nodeCount - 1], owner))
            Give(next, variable.Gradient, borrowed: true);
        return owner;
    }

    private bool Reads(in Node node, int variable)
    {
        foreach (ref readonly Tensor input in _tensors.AsSpan(node.FirstTensor, node.Inputs))
            if (input.Variable == variable) return true;
        return false;
    }

    private void Give(int variable, in Tensor gradient, bool borrowed)
    {
        ref Variable to = ref _variables[variable];
        (to.Gradient, to.Written, to.Borrowed) = (gradient, true, borrowed);
    }

    private bool Replay(in Node node, in Variable variable)
    {
        Tensor x = _tensors[node.FirstTensor];
        int bottom = _nodeCount;
        IBlock block = node.Block!;
        block.Acquire(backward: true);
        Device.BeginAgain(_pool);
        try
        {
            _again = true;
            Tensor y = node.Again!.Forward(this, block, x, node.Context!);
            _again = false;
            if (y.Spec != node.Output.Spec)
                throw new InvalidOperationException(
                    $"a block gave {node.Output.Spec}, then {y.Spec}");
            Give(y.Variable, variable.Gradient, variable.Borrowed);
            Unwind(bottom);
        }
        finally
        {
            _again = false;
            Device.EndAgain();
            block.Release();
        }

        return true;
    }

    /// <summary>
    /// The gradient buffer of a variable, taken from the pool when first asked for.
    /// </summary>
    private GradientTarget Wanted(in Tensor tensor)
    {
        ref Variable variable = ref _variables[tensor.Variable];
        if (!variable.Gradient.Exists)
            variable.Gradient = variable.Whole.Exists
                ? PartOfGradient(variable, tensor.Spec)
                : _pool.Take(tensor.Spec);
        var target = new GradientTarget(
            Seen(variable.Gradient, tensor.Shape), Accumulate: variable.Written);
        variable.Written = true;
        return target;
    }

    private Tensor PartOfGradient(in Variable part, Spec spec)
    {
        ref Variable whole = ref _variables[part.Whole.Variable];
        if (!whole.Gradient.Exists) whole.Gradient = _pool.Take(part.Whole.Spec);
        whole.Written = true;
        return new Tensor(whole.Gradient.Data + part.Offset, spec);
    }

    // What nothing followed from has no gradient; beside parts that have one it is zero.
    private void FillParts(int variable, int parts)
    {
        for (int i = variable + 1; i <= variable + parts; i++)
        {
            if (_variables[i].Written) continue;
            nint end = i < variable + parts
                ? _variables[i + 1].Offset
                : (nint)_variables[i].Whole.Spec.Bytes;
            int bytes = checked((int)(end - _variables[i].Offset));
            Device.Fill(new Tensor(_variables[variable].Gradient.Data + _variables[i].Offset,
                new Spec(DType.U8, new Shape(bytes))), 0);
        }
    }

    // A tensor may be used in another shape than the one in which it was made; each gradient has
    // the shape of its place.
    private static Tensor Seen(Tensor gradient, Shape shape) =>
        gradient with { Spec = new Spec(gradient.Type, shape) };
}
