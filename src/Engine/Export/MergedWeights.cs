using System.Numerics.Tensors;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Export;

/// <summary>
/// A model's weights with an adapter put in, in F32 and some rows at a time, so that a model of any
/// size passes through a few megabytes: W + Scale * B A for the layers with an adapter (Hu et al.
/// 2021; Scale as PEFT has it), rows brought to DoRA's magnitudes where it has them, the
/// adapter's own values for biases and for modules that it holds
/// whole. Without an adapter, the weights as they are.
/// </summary>
internal sealed unsafe class MergedWeights : IDisposable
{
    private readonly AdapterFile? _adapter;
    private readonly Dictionary<string, LowRank> _deltas = new(StringComparer.Ordinal);
    private readonly Dictionary<string, StoredTensor> _replaced = new(StringComparer.Ordinal);
    private readonly Dictionary<string, (float[] Values, float Scale)> _added =
        new(StringComparer.Ordinal);
    private readonly Dictionary<string, (IReadOnlyList<int> Ids, float[] Values)> _rows =
        new(StringComparer.Ordinal);

    private MergedWeights(ModelSpec spec, Checkpoint weights, AdapterFile? adapter) =>
        (Spec, Checkpoint, _adapter) = (spec, weights, adapter);

    /// <summary>The model, its layers replicated where the adapter does that.</summary>
    public ModelSpec Spec { get; private set; }

    /// <summary>The layers that the adapter runs, where they are others than the model's.</summary>
    public LayerRanges? Replicated => _adapter?.Config.LayerReplication;

    public Checkpoint Checkpoint { get; }

    /// <param name="model">A model's folder.</param>
    /// <param name="adapter">An adapter's folder, or null.</param>
    /// <exception cref="InputException">
    /// A file is missing or broken, or the adapter does not fit the model.
    /// </exception>
    public static MergedWeights Open(string model, string? adapter)
    {
        ModelSpec spec = ModelSpec.Read(model).Hearing(wanted: false, adapter);
        var merged = new MergedWeights(spec, Checkpoint.Open(model),
            adapter is null ? null : AdapterFile.Open(adapter, spec.Parameters));
        try
        {
            merged.Checkpoint.MustMatch(spec.Parameters, Families.Explain);
            merged.Spec = spec.Replicated(merged.Replicated, merged.Checkpoint);
            merged.TakeAdapter();
            return merged;
        }
        catch
        {
            merged.Dispose();
            throw;
        }
    }

    /// <summary>Whether the adapter changes the tensor.</summary>
    public bool Changes(string name) => IsAnother(name) || _added.ContainsKey(name)
        || _rows.ContainsKey(name);

    /// <summary>
    /// Whether the embedding and a head that is the same matrix are two with the adapter in; rows
    /// of single tokens are both's.
    /// </summary>
    public bool Unties(string embedding, string head) => IsAnother(embedding) || IsAnother(head);

    /// <summary>
    /// Values begin..begin+target.Length of a tensor as they were, and with the adapter in target;
    /// both whole rows where an adapter sits.
    /// </summary>
    /// <exception cref="InputException">A file cannot be read, or a value is not
    /// finite.</exception>
    public void Read(StoredTensor tensor, long begin, Span<float> target, Span<float> before)
    {
        Widen(tensor, begin, before);
        if (_replaced.TryGetValue(tensor.Name, out var own)) Widen(own, begin, target);
        else before.CopyTo(target);
        if (_deltas.TryGetValue(tensor.Name, out var delta)) delta.Add(begin, target);
        if (_added.TryGetValue(tensor.Name, out var added))
            TensorPrimitives.MultiplyAdd(added.Values.AsSpan((int)begin, target.Length),
                added.Scale,
                target, target);
        if (_rows.TryGetValue(tensor.Name, out var rows)) Put(rows.Ids, rows.Values, begin, target);
        if (!TensorPrimitives.IsFiniteAll<float>(target))
            throw new InputException($"{tensor.Place} has NaN or Inf"
                + (Changes(tensor.Name) ? " once the adapter is put in" : ""));
    }

    public void Dispose()
    {
        _adapter?.Dispose();
        Checkpoint.Dispose();
    }

    private void TakeAdapter()
    {
        if (_adapter is null) return;
        AdapterConfig config = _adapter.Config;
        AdapterLayout layout = _adapter.Layout(Spec.Parameters);
        var stored = _adapter.Match(layout);
        _adapter.MustBeOn(Checkpoint);
        foreach (StoredTensor tensor in stored.Values) tensor.MustBeFinite(DType.F32);
        foreach (Adapter adapter in Adapters.Of(config, layout).List)
        {
            LinearModule linear = layout.Targets[adapter.Index];
            float[] a = layout.Tensor(adapter.NameOfA).Own(stored[adapter.NameOfA].ToFloats());
            float[] b = layout.Tensor(adapter.NameOfB).Own(stored[adapter.NameOfB].ToFloats());
            // A table is W^T, to which A^T B^T is added.
            _deltas.Add(linear.Weight, linear.IsTable
                ? new LowRank(AdapterLayout.Transposed(b, adapter.Rank), a, adapter.Rank,
                    linear.Outputs, (float)adapter.Scale)
                : new LowRank(a, b, adapter.Rank, linear.Inputs, (float)adapter.Scale,
                    stored.GetValueOrDefault(Adapters.NameOfMagnitude(linear.Name))?.ToFloats(),
                    adapter.Experts > 0 ? linear.Outputs : 0));
            if (!adapter.HasBias) continue;
            if (!linear.HasBias)
                throw new InputException($"{_adapter.Directory}: {linear.Name} has no bias that "
                    + "lora_bias could be merged into");
            _added.Add(linear.Name + ".bias",
                (stored[adapter.NameOfBias].ToFloats(), (float)adapter.Scale));
        }

        foreach (TokenTarget tokens in layout.Tokens)
            _rows.Add(tokens.Module.Weight, (tokens.Ids, stored[tokens.Name].ToFloats()));

        foreach (var (name, tensor) in stored)
            if (Spec.Parameters.Find(name) is not null) _replaced.Add(name, tensor);
    }

    private bool IsAnother(string name) => _deltas.ContainsKey(name) || _replaced.ContainsKey(name);

    // Rows that are among those of target.
    private static void Put(
        IReadOnlyList<int> ids, float[] values, long begin, Span<float> target)
    {
        int cols = values.Length / ids.Count;
        for (int i = 0; i < ids.Count; i++)
        {
            long at = ((long)ids[i] * cols) - begin;
            if (at >= 0 && at < target.Length)
                values.AsSpan(i * cols, cols).CopyTo(target[(int)at..]);
        }
    }

    private static void Widen(StoredTensor tensor, long begin, Span<float> target)
    {
        int size = tensor.StoredType.Size;
        var bytes = new byte[target.Length * size];
        tensor.Read(begin * size, bytes);
        fixed (byte* from = bytes)
        fixed (float* to = target) FloatBits.Widen(from, tensor.Type, to, target.Length);
    }
}
