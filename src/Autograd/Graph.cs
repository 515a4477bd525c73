using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <summary>
/// Reverse-mode differentiation over one device: a tape of what ran.
/// It knows order, never operations.
///
/// A tensor with a variable number needs a gradient: parameters have one for good, and the output
/// of an operation gets one when any input has. Only such operations are recorded; a frozen part of
/// a model therefore leaves nothing on the tape, and <see cref="Keep"/> drops its activations at
/// once. The tape and the step arena are stacks that fall together: backward takes the last node,
/// hands its output gradient to the operation, gives that gradient back to the pool and pops the
/// arena to where it stood before the node ran.
///
/// A checkpointed block runs unrecorded and leaves only its output; backward runs it again,
/// recorded, above the tape's top, and unwinds that piece before going on. Random masks are keyed
/// by position, not drawn from a stream, so that the second run draws the same.
///
/// A fleeting tensor is no longer there when the layer that made it has run: it comes from the pool
/// and goes back when dropped. Backward makes it again, by the same operation on the same inputs
/// (fleeting ones first), when an operation's backward reads it; most that are made to be fleeting
/// nobody reads. What a block makes again in backward is computed only as far as it is read, too:
/// not its last sum, nor the product before that.
///
/// An operation has one output, which may be several matrices behind each other: its parts have
/// gradients of their own in the memory of the whole one's. Where a gradient is the same numbers as
/// another (a sum's), its memory is handed over rather than copied.
///
/// Left out: other views with gradients, second derivatives, threads.
/// Nothing here allocates once a step of the largest shape has run.
/// </summary>
public sealed partial class Graph
{
    private readonly GradientPool _pool;
    private readonly GradientTarget[] _targets = new GradientTarget[Limits.MaxInputs];
    private readonly Tensor[] _saved = new Tensor[Outputs.MaxSaved];
    private readonly Tensor[] _inputs = new Tensor[Limits.MaxInputs];
    private readonly bool[] _trained = new bool[Limits.MaxInputs];
    private Variable[] _variables = new Variable[1024];
    private Node[] _nodes = new Node[1024];
    private Tensor[] _tensors = new Tensor[4096];
    private int _variableCount = 1;
    private int _parameterCount;
    private int _nodeCount;
    private int _tensorCount;
    private bool _recording = true, _again;

    public Graph(Device device)
    {
        Device = device;
        _pool = new GradientPool(device);
    }

    public Device Device { get; }

    /// <summary>Most bytes the step's activations and activation gradients ever took.</summary>
    public long PeakBytes => Device.Step.Peak + _pool.Peak;

    /// <summary>Whether operations are recorded; off for evaluation.</summary>
    public bool Recording
    {
        get => _recording;
        set => _recording = value;
    }

    /// <summary>
    /// Sees, in backward, the finished gradient of each recorded output by its variable.
    /// </summary>
    public Action<int, Tensor>? GradientVisitor { get; set; }

    /// <summary>Nodes on the tape.</summary>
    public int Length => _nodeCount;

    /// <summary>
    /// Makes a tensor trainable: gradients of a run are written to, or added into, the given buffer
    /// of the same shape. All parameters are made before the first operation runs.
    /// </summary>
    /// <param name="value">What operations take.</param>
    /// <param name="gradient">Where they write its gradient.</param>
    /// <param name="home">Where that lies while no block runs, if it is elsewhere.</param>
    public Tensor Parameter(Tensor value, Tensor gradient, Tensor home = default)
    {
        if (_nodeCount > 0 || _variableCount != _parameterCount + 1)
            throw new InvalidOperationException("parameters are made before operations run");
        if (value.Shape != gradient.Shape || value.Spec.Layout != Layout.RowMajor)
            throw new ShapeException($"a gradient of {gradient.Spec} for a parameter {value.Spec}");
        _parameterCount++;
        Tensor parameter = value with { Variable = NewVariable(gradient) };
        _variables[parameter.Variable].Home = home.Exists ? home : gradient;
        return parameter;
    }

    /// <summary>Forgets the parameters' gradients: the next backward overwrites them.</summary>
    public void ClearGradients()
    {
        for (int i = 1; i <= _parameterCount; i++) _variables[i].Written = false;
        Device.ForgetGradients();
    }

    /// <summary>
    /// Ends the backwards of a step: gradients are where they lie between steps, that of every
    /// parameter that none has reached is zero.
    /// </summary>
    public void ZeroUnreachedGradients()
    {
        Device.BringGradientsHome();
        for (int i = 1; i <= _parameterCount; i++)
        {
            if (_variables[i].Written) continue;
            Device.Fill(_variables[i].Home, 0);
            _variables[i].Written = true;
        }
    }

    /// <summary>Runs an operation and records it if a gradient must flow through it.</summary>
    /// <exception cref="ShapeException">
    /// The inputs do not fit, a gradient is needed that the operation cannot give, or one trainable
    /// tensor stands in two places.
    /// </exception>
    public Tensor Run(Op op, params ReadOnlySpan<Tensor> inputs) =>
        Run(op, keepSaved: false, Life.Kept, inputs);

    /// <summary>
    /// As Run; what the operation saves stays readable through the spans until the scope ends.
    /// </summary>
    public Tensor Run(Op op, Span<Tensor> saved, params ReadOnlySpan<Tensor> inputs)
    {
        Tensor output = Run(op, keepSaved: true, Life.Kept, inputs);
        _saved.AsSpan(0, saved.Length).CopyTo(saved);
        return output;
    }

    /// <summary>
    /// Runs a block on x. Where nothing in it needs a gradient, or nothing is recorded, its
    /// activations go at once; where nothing is recorded x goes too, if it was made last: its
    /// result takes its place. With checkpoint, only x is kept for backward, which runs the block
    /// again; the block must then give the same result each time, from x and from what the context
    /// says, which must outlive the backward.
    /// </summary>
    public Tensor Run<TContext>(
        IBlock<TContext> block, Tensor x, TContext context, bool checkpoint)
        where TContext : class
    {
        bool constant = !_recording || (!block.Trainable && x.Variable == 0);
        if (!constant && !checkpoint) return Forward(block, x, context);
        ArenaMark mark = Device.Step.Mark();
        bool before = _recording;
        ArenaMark end = before ? mark : Device.Step.Before(x, mark);
        _recording = false;
        Tensor y;
        try
        {
            y = Keep(end, Forward(block, x, context));
        }
        finally
        {
            _recording = before;
        }

        if (constant) return y;
        y = y with { Variable = NewVariable(Tensor.None) };
        Record(new Node(null, Again<TContext>.Instance, block, context, mark, _tensorCount, 1, 0, y,
            Device.Random), [x], []);
        return y;
    }

    /// <summary>
    /// The matrices [rows, columns of each] that an operation's output is in memory, one behind the
    /// other. Asked for right after the operation ran, and used in the output's stead.
    /// </summary>
    public void Split(Tensor output, Span<Tensor> parts, ReadOnlySpan<int> columns)
    {
        if (output.Variable != 0 && output.Variable != _variableCount - 1)
            throw new InvalidOperationException("an output is split before anything else runs");
        int rows = checked((int)output.Shape.Rows);
        nint offset = 0;
        if (output.Variable != 0) _variables[output.Variable].Parts = columns.Length;
        for (int i = 0; i < columns.Length; i++)
        {
            var spec = new Spec(output.Type, new Shape(rows, columns[i]));
            parts[i] = output with
            {
                Data = output.Data + offset,
                Spec = spec,
                Variable = output.Variable == 0 ? 0 : NewVariable(Tensor.None),
            };
            if (output.Variable != 0)
                _variables[parts[i].Variable] = new Variable { Whole = output, Offset = offset };
            offset += (nint)spec.Bytes;
        }

        if (offset != (nint)output.Spec.Bytes)
            throw new ShapeException($"{output.Spec} in parts of {offset} bytes");
    }

    /// <summary>
    /// Ends the life of everything made since the mark except this tensor, which moves down to the
    /// mark. Only for unrecorded work: throws if the tape grew.
    /// </summary>
    public Tensor Keep(ArenaMark mark, Tensor tensor)
    {
        if (_nodeCount > 0 && _nodes[_nodeCount - 1].Mark.Slots >= mark.Slots)
            throw new InvalidOperationException("recorded work cannot be dropped");
        if (tensor.Slot <= mark.Slots) { Device.Step.Pop(mark); return tensor; }
        Device.Step.Check(tensor);
        Device.Step.Pop(mark);
        Tensor kept = Device.Step.Push(tensor.Spec, "kept");
        // Lower or equal in the same memory, so the copy may overlap
        // but never runs out of the arena.
        if (kept.Data != tensor.Data) Device.Copy(tensor with { Slot = 0 }, kept);
        return kept;
    }

    /// <summary>
    /// Adds the gradient of seed * sum(output) to the parameters' gradients, and takes the tape
    /// down to empty. Tensors made since the first recorded operation end their life.
    /// </summary>
    public void Backward(Tensor output, double seed) => Backward([output], [seed]);

    /// <summary>
    /// The same of several outputs, each with its seed; those without a gradient are left out.
    /// What ran last is undone first.
    /// </summary>
    public void Backward(ReadOnlySpan<Tensor> outputs, ReadOnlySpan<double> seeds)
    {
        bool any = false;
        for (int i = 0; i < outputs.Length; i++)
        {
            if (outputs[i].Variable <= _parameterCount) continue;
            Device.Fill(Wanted(outputs[i]).Buffer, seeds[i]);
            any = true;
        }

        if (!any) throw new InvalidOperationException("nothing trainable leads to this tensor");
        Unwind(0);
    }

    /// <summary>
    /// Drops the tape and everything in the arena; the end of a step or of an evaluation.
    /// </summary>
    public void EndStep()
    {
        _nodeCount = _tensorCount = 0;
        _variableCount = _parameterCount + 1;
        _pool.Reset();
        Device.Step.Pop(default);
    }

    private Tensor Forward<TContext>(IBlock<TContext> block, Tensor x, TContext context)
        where TContext : class
    {
        block.Acquire(backward: false);
        try
        {
            return block.Forward(this, x, context);
        }
        finally
        {
            block.Release();
        }
    }

    private Tensor Run(Op op, bool keepSaved, Life life, ReadOnlySpan<Tensor> inputs)
    {
        bool record = Needed(op, inputs) && _recording;
        Span<Spec> specs = stackalloc Spec[inputs.Length];
        for (int i = 0; i < inputs.Length; i++) specs[i] = inputs[i].Spec;
        Outputs outputs = op.Infer(specs, Device.Activations);
        bool fleeting = life == Life.Fleeting && record;
        // Made when it is read, if ever; what is saved for backward is made now.
        bool isLazy = record && (life == Life.Unread || (fleeting && _again));
        bool later = isLazy && outputs.SavedCount == 0, skip = isLazy && op.CanSkipOutput;
        ArenaMark before = Device.Step.Mark();
        Tensor output = fleeting
            ? later || skip ? new Tensor(0, outputs.Output) : _pool.Take(outputs.Output)
            : Device.Step.Push(outputs.Output, op.Name);
        ArenaMark after = Device.Step.Mark();
        for (int i = 0; i < outputs.SavedCount; i++)
            _saved[i] = Device.Step.Push(outputs.Saved(i), op.Name);
        ReadOnlySpan<Tensor> saved = _saved.AsSpan(0, outputs.SavedCount);
        if (!later)
            Forward(op, inputs, skip ? Tensor.None : output, outputs.SavedCount, record);
        if (record)
        {
            output = output with { Variable = NewVariable(Tensor.None) };
            Record(new Node(op, null, null, null, before, _tensorCount, inputs.Length, saved.Length,
                output, Device.Random), inputs, saved);
            if (!fleeting) return output;
            ref Variable variable = ref _variables[output.Variable];
            variable.Maker = _nodeCount;
            if (!later && !skip) variable.Value = output;
        }
        else if (!keepSaved)
        {
            Device.Step.Pop(after);
        }

        return output;
    }

    // Runs it on what there is of its inputs now; _saved has what it saves.
    private void Forward(
        Op op, ReadOnlySpan<Tensor> inputs, Tensor output, int saved, bool record)
    {
        for (int i = 0; i < inputs.Length; i++) _inputs[i] = Present(inputs[i]);
        Device.Forward(op, new OpCall(
            _inputs.AsSpan(0, inputs.Length), output, _saved.AsSpan(0, saved), record));
    }

    private bool Needed(Op op, ReadOnlySpan<Tensor> inputs)
    {
        bool needed = false;
        for (int i = 0; i < inputs.Length; i++)
        {
            if (inputs[i].Variable == 0) continue;
            if (!op.Differentiates(i))
                throw new ShapeException($"{op.Name}: input {i} has no gradient, but needs one");
            for (int j = 0; j < i; j++)
                if (inputs[j].Variable == inputs[i].Variable)
                    throw new ShapeException($"{op.Name}: inputs {j} and {i} are the same tensor");
            needed = true;
        }

        return needed;
    }

    private void Record(Node node, ReadOnlySpan<Tensor> inputs, ReadOnlySpan<Tensor> saved)
    {
        if (_nodeCount == _nodes.Length) Array.Resize(ref _nodes, _nodeCount * 2);
        int end = _tensorCount + inputs.Length + saved.Length;
        if (end > _tensors.Length) Array.Resize(ref _tensors, Math.Max(end, _tensors.Length * 2));
        inputs.CopyTo(_tensors.AsSpan(_tensorCount));
        saved.CopyTo(_tensors.AsSpan(_tensorCount + inputs.Length));
        _tensorCount = end;
        _nodes[_nodeCount++] = node;
    }

    private int NewVariable(Tensor gradient)
    {
        if (_variableCount == _variables.Length) Array.Resize(ref _variables, _variableCount * 2);
        _variables[_variableCount] = new Variable { Gradient = gradient };
        return _variableCount++;
    }

    private struct Variable
    {
        public Tensor Gradient;
        public bool Written;

        /// <summary>Of a parameter: where its gradient is between steps.</summary>
        public Tensor Home;

        // Of a fleeting tensor: its node from 1, and where it lies while it is there.
        public int Maker;
        public Tensor Value;

        /// <summary>The memory is another's, who has it when this variable's node is undone.
        /// </summary>
        public bool Borrowed;

        /// <summary>The output that this is a part of, and where it begins in its bytes.</summary>
        public Tensor Whole;
        public nint Offset;

        /// <summary>Number of parts, whose variables follow this one.</summary>
        public int Parts;
    }

    /// <summary>
    /// An operation or a checkpointed block on the tape; its tensors lie in a row from FirstTensor.
    /// </summary>
    private readonly record struct Node(
        Op? Op, Again? Again, IBlock? Block, object? Context, ArenaMark Mark, int FirstTensor,
        int Inputs, int Saved, Tensor Output, Randomness Random);

    // Runs a block again without knowing the type of its context; one object for each type.
    private abstract class Again
    {
        public abstract Tensor Forward(Graph graph, IBlock block, Tensor x, object context);
    }

    private sealed class Again<TContext> : Again
        where TContext : class
    {
        public static readonly Again<TContext> Instance = new();

        public override Tensor Forward(Graph graph, IBlock block, Tensor x, object context) =>
            ((IBlock<TContext>)block).Forward(graph, x, (TContext)context);
    }

    private enum Life { Kept, Fleeting, Unread }

    private static class Limits
    {
        public const int MaxInputs = 16;
    }
}
