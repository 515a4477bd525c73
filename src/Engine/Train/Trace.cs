using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Runs one batch and keeps its named intermediate tensors, for comparing with other
/// implementations. Text tensors are packed: the rows' tokens follow each other without padding.
/// The pictures' patches lie as their tower has them. Gradients are those of the mean loss over all
/// supervised tokens.
/// </summary>
public sealed class Trace : ITensorProbe
{
    private readonly TunedModel _model;
    private readonly SortedDictionary<string, (Shape Shape, float[] Values)> _floats =
        new(StringComparer.Ordinal);
    private readonly SortedDictionary<string, (Shape Shape, int[] Values)> _ints =
        new(StringComparer.Ordinal);
    private readonly Dictionary<int, string> _watched = [];

    private Trace(TunedModel model) => _model = model;

    public IReadOnlyDictionary<string, (Shape Shape, float[] Values)> Floats => _floats;

    public IReadOnlyDictionary<string, (Shape Shape, int[] Values)> Ints => _ints;

    /// <summary>Traces a batch; gradients only where something is trained.</summary>
    public static Trace Run(TunedModel model, Batch batch, bool gradients)
    {
        var trace = new Trace(model);
        Graph graph = model.Graph;
        graph.ClearGradients();
        graph.Recording = gradients;
        try
        {
            Tensor hidden = model.Hidden(batch, trace);
            trace.AddInput(batch);
            trace.AddLogits(hidden);
            trace.AddLoss(model.Model.Loss(graph, hidden, []), batch, gradients);
        }
        finally
        {
            graph.GradientVisitor = null;
            graph.EndStep();
            graph.Recording = true;
        }

        return trace;
    }

    public void Visit(string name, Tensor tensor)
    {
        _floats.Add(name, (tensor.Shape, _model.Device.ReadFloats(tensor)));
        if (tensor.Variable != 0) _watched[tensor.Variable] = name;
    }

    /// <summary>Writes everything under its names, in F32 and I32.</summary>
    /// <exception cref="RunException">The file cannot be written.</exception>
    public void Save(string path)
    {
        var tensors = new List<TensorToSave>();
        foreach (var (name, (shape, values)) in _floats)
            tensors.Add(new TensorToSave(name, DType.F32, shape, stream =>
                stream.Write(System.Runtime.InteropServices.MemoryMarshal.AsBytes<float>(values))));
        foreach (var (name, (shape, values)) in _ints)
            tensors.Add(new TensorToSave(name, DType.I32, shape, stream =>
                stream.Write(System.Runtime.InteropServices.MemoryMarshal.AsBytes<int>(values))));
        SafetensorsWriter.Write(path, tensors);
    }

    private void AddInput(Batch batch)
    {
        var labels = new int[batch.Tokens.Count];
        Array.Fill(labels, -100);
        for (int i = 0; i < batch.LabelRows.Count; i++)
            labels[batch.LabelRows[i]] = batch.Targets[i];
        Add("input_ids", batch.Tokens.Span, batch.Tokens.Count);
        Add("labels", labels, labels.Length);
        Add("position_ids", batch.Positions.Span, batch.Positions.Count);
        Add("sequence_starts", batch.SequenceStarts.Span, batch.SequenceStarts.Count);
        Add("image_bound", batch.ImageBounds.Span, batch.ImageBounds.Count / 2, 2);
        Add("tgt_sizes", batch.Grids.Span, batch.Grids.Count / 2, 2);
        if (_model.Model.Batch.Pictures == 0) return;
        Tensor ids = _model.Model.Vision.PositionIds;
        if (!ids.Exists) return;
        var positions = new int[ids.Shape.Count];
        _model.Device.Read<int>(ids, positions);
        Add("vision.position_ids", positions, positions.Length);
    }

    // Logits of all tokens at once would be the largest tensor by far;
    // they leave in pieces of rows.
    private void AddLogits(Tensor hidden)
    {
        const int rows = 256;
        int vocabulary = _model.Spec.Decoder.VocabSize;
        var logits = new float[(long)hidden.Shape[0] * vocabulary];
        bool recording = _model.Graph.Recording;
        _model.Graph.Recording = false;
        for (int begin = 0; begin < hidden.Shape[0]; begin += rows)
        {
            int count = Math.Min(rows, hidden.Shape[0] - begin);
            ArenaMark mark = _model.Device.Step.Mark();
            Tensor piece = _model.Model.Logits(_model.Graph, hidden.Slice(begin, count));
            _model.Device.ReadFloats(piece).CopyTo(logits, (long)begin * vocabulary);
            _model.Device.Step.Pop(mark);
        }

        _model.Graph.Recording = recording;
        _floats.Add("logits", (new Shape(hidden.Shape[0], vocabulary), logits));
    }

    private void AddLoss(Tensor loss, Batch batch, bool gradients)
    {
        int labels = batch.LabelRows.Count;
        _floats.Add("loss", (new Shape(), [_model.Device.ReadFloats(loss)[0] / labels]));
        if (!gradients) return;
        _model.Graph.GradientVisitor = (variable, gradient) =>
        {
            if (_watched.TryGetValue(variable, out string? name))
                _floats["grad." + name] = (_floats[name].Shape, _model.Device.ReadFloats(gradient));
        };
        if (loss.Variable != 0) _model.Graph.Backward(loss, 1.0 / labels);
        _model.Graph.ZeroUnreachedGradients();
        foreach (TunedTensor tensor in _model.ParameterRanges.List)
        {
            float[] values = _model.Device.ReadFloats(_model.ParameterRanges.Gradient(tensor.Name));
            _floats.Add("grad." + FileName(tensor.Name), (tensor.Shape, values));
        }
    }

    /// <summary>The parameter's official name, or with adapters its name in PEFT's files.</summary>
    private string FileName(string name) =>
        _model.Parts.Layout?.Tensors.First(t => t.Name == name).FileName ?? name;

    private void Add(string name, ReadOnlySpan<int> values, params ReadOnlySpan<int> sizes) =>
        _ints.Add(name, (new Shape(sizes), values.ToArray()));
}
