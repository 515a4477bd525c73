using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Export;

/// <summary>What `cpmx merge` was asked for.</summary>
/// <param name="Model">Folder of the model that the adapter was trained on.</param>
/// <param name="Adapter">The adapter's folder.</param>
/// <param name="Out">The folder to make.</param>
/// <param name="Check">Whether the merged model's logits are compared with the adapter's.</param>
public sealed record MergeRequest(string Model, string Adapter, string Out, bool Check = true);

/// <summary>
/// `cpmx merge`: puts an adapter into the weights, so that anything that loads the model loads the
/// tuned one. The result has the model's names, layout and types, and its other files as a full
/// save has them. Tensors that the adapter does not touch keep their bytes; the others are computed
/// in F32 and rounded once to the type that they are stored in.
/// </summary>
public sealed unsafe class MergeRun
{
    private const int PieceElements = 1 << 20;

    private readonly MergeRequest _request;
    private readonly MergedWeights _weights;
    private readonly Dictionary<string, WeightChange> _changes = [];

    private MergeRun(MergeRequest request, MergedWeights weights) =>
        (_request, _weights) = (request, weights);

    /// <exception cref="InputException">
    /// Model and adapter do not fit together, the adapter changes nothing, or there is something at
    /// the place to write to.
    /// </exception>
    /// <exception cref="RunException">
    /// The result cannot be written, or does not do what the adapter does.
    /// </exception>
    public static void Run(MergeRequest request, TextWriter output)
    {
        using MergedWeights weights = MergedWeights.Open(request.Model, request.Adapter);
        new MergeRun(request, weights).Run(output);
    }

    private void Run(TextWriter output)
    {
        IReadOnlyList<TensorToSave> tensors = Tensors(out bool untied);
        using NewFolder folder = NewFolder.Create(_request.Out, tensors.Sum(t => t.Bytes));
        CheckpointWriter.Write(folder.Path, tensors);
        if (_changes.Values.All(change => change.Stored == 0))
            throw new InputException($"{_request.Adapter}: merging it changes no value of "
                + $"{_request.Model} as it is stored: was it trained?");
        foreach (var (name, content) in SavedFiles.Read(
            _request.Model, _weights.Spec, Trained(), Storage(), output.WriteLine))
        {
            byte[] saved = untied && name == "config.json" ? Untied(content) : content;
            AtomicFile.Write(Path.Combine(folder.Path, name), stream => stream.Write(saved));
        }

        Tell(output);
        if (_request.Check)
            output.WriteLine(LogitCheck.Run(_request.Model, _request.Adapter, folder.Path));
        folder.Place();
        output.WriteLine($"the merged model is in {_request.Out}");
    }

    // A head that is the embedding goes on with the original where the adapter has an embedding of
    // its own, as PEFT has it; from here on they are two tensors.
    private List<TensorToSave> Tensors(out bool untied)
    {
        var parameters = _weights.Spec.Parameters;
        var tensors = new List<TensorToSave>();
        foreach (StoredTensor tensor in _weights.Checkpoint.Tensors)
            tensors.Add(_weights.Changes(tensor.Name) ? Merged(tensor) : tensor.ToSave());
        untied = false;
        foreach (var (module, to) in parameters.Tied)
        {
            if (!_weights.Changes(to + ".weight")) continue;
            StoredTensor original = _weights.Checkpoint.Get(to + ".weight");
            tensors.Add(original.ToSave() with { Name = module + ".weight" });
            untied = true;
        }

        return tensors;
    }

    private TensorToSave Merged(StoredTensor tensor)
    {
        var change = _changes[tensor.Name] = new WeightChange();
        DType type = tensor.Type;
        return new TensorToSave(tensor.Name, tensor.StoredType, tensor.Sizes, stream =>
        {
            // Whole rows, so that a piece has all of its part of B.
            int row = Math.Max(1, checked((int)(tensor.Count / Math.Max(1, tensor.Sizes[0]))));
            int piece = (int)Math.Min(tensor.Count, Math.Max(1, PieceElements / row) * (long)row);
            float[] before = new float[piece], after = new float[piece], stored = new float[piece];
            var bytes = new byte[piece * type.Size()];
            for (long done = 0; done < tensor.Count; done += piece)
            {
                int count = (int)Math.Min(piece, tensor.Count - done);
                Span<float> was = before.AsSpan(0, count), now = after.AsSpan(0, count);
                _weights.Read(tensor, done, now, was);
                fixed (float* from = now)
                fixed (float* back = stored)
                fixed (byte* to = bytes)
                {
                    FloatBits.Narrow(from, to, type, count);
                    FloatBits.Widen(to, type, back, count);
                }

                change.Add(was, now, stored.AsSpan(0, count));
                stream.Write(bytes, 0, count * type.Size());
            }
        });
    }

    private void Tell(TextWriter output)
    {
        output.WriteLine($"the adapter has {_changes.Count} of {_weights.Checkpoint.Tensors.Count} tensors; "
            + "largest and mean change of a value, and how many are others as stored:");
        int width = _changes.Keys.Max(name => name.Length);
        foreach (var (name, change) in _changes)
            output.WriteLine(FormattableString.Invariant(
                $"  {name.PadRight(width)}  {change.Largest,9:0.00E+0}  {change.Mean,9:0.00E+0}  ")
                + FormattableString.Invariant($"{100 * change.Stored,5:0.0} %"));
    }

    // What a run wrote beside its result, or above its checkpoint: how pictures were cut then.
    private TrainArguments? Trained()
    {
        if (TrainWriter.Beside(_request.Adapter) is not { } json) return null;
        var trained = new TrainArguments();
        return trained with
        {
            MaxSliceNums = json.Find("max_slice_nums")?.Int(1) ?? trained.MaxSliceNums,
            OfficialCompat = json.Find("official_compat")?.Bool() ?? trained.OfficialCompat,
        };
    }

    // The type that most of the model is stored in.
    private DType Storage() => _weights.Checkpoint.Tensors
        .Where(t => !_weights.Spec.Parameters.IsUntouched(t.Name))
        .GroupBy(t => t.Type).MaxBy(group => group.Sum(t => t.Bytes))!.Key;

    private static byte[] Untied(byte[] config) => SavedFiles.Edit(config, json =>
    {
        json["tie_word_embeddings"] = false;
        return true;
    });
}
