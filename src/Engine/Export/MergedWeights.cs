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
        ModelSpec spec = ModelSpec.Read(model);
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
    public bool Changes(string name) => _deltas.ContainsKey(name) || _replaced.ContainsKey(name);

    /// <summary>
    /// Values begin..begin+target.Length of a tensor as they were, and with the adapter in target;
    /// both whole rows where an adapter sits.
    /// </summary>
    /// <exception cref="InputException">A file cannot be read, or a value is not finite.</exception>
    public void Read(StoredTensor tensor, long begin, Span<float> target, Span<float> before)
    {
        Widen(tensor, begin, before);
        if (_replaced.TryGetValue(tensor.Name, out var own)) Widen(own, begin, target);
        else before.CopyTo(target);
        if (_deltas.TryGetValue(tensor.Name, out var delta)) delta.Add(begin, target);
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
        var stored = _adapter.Match(Spec.Parameters);
        foreach (StoredTensor tensor in stored.Values) tensor.MustBeFinite(DType.F32);
        foreach (LinearModule linear in Spec.Parameters.Linears)
        {
            if (!stored.TryGetValue(Adapters.NameOfA(linear.Name), out var a)) continue;
            StoredTensor b = stored[Adapters.NameOfB(linear.Name)];
            _deltas.Add(linear.Name + ".weight", new LowRank(
                a.ToFloats(), b.ToFloats(), a.Shape[0], linear.Inputs,
                (float)config.ScaleOf(linear.Name),
                stored.GetValueOrDefault(Adapters.NameOfMagnitude(linear.Name))?.ToFloats()));
        }

        foreach (var (name, tensor) in stored)
            if (Spec.Parameters.Find(name) is not null) _replaced.Add(name, tensor);
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
