using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Export;

/// <summary>What `cpmx merge` was asked for.</summary>
/// <param name="Model">Folder of the model that the adapter was trained on.</param>
/// <param name="Adapter">The adapter's folder; null only makes a quantised model whole.</param>
/// <param name="Out">The folder to make.</param>
/// <param name="Check">Whether the merged model's logits are compared with the adapter's.</param>
/// <param name="Dequantize">Whether quantised weights become those of 16 bits.</param>
public sealed record MergeRequest(
    string Model, string? Adapter, string Out, bool Check = true, bool Dequantize = false);

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
        StoredTensor? packed = weights.Checkpoint.Tensors.FirstOrDefault(t => t is PackedTensor);
        if (packed is not null && !request.Dequantize)
            throw new InputException($"{packed.Place} is quantised, into which no adapter is "
                + "merged: --dequantize writes the model in 16 bits");
        if (packed is null && request.Dequantize)
            throw new InputException($"{request.Model}: --dequantize is given and nothing is "
                + "quantised: leave it out");
        new MergeRun(request, weights).Run(output);
    }

    private void Run(TextWriter output)
    {
        IReadOnlyList<TensorToSave> tensors = Tensors(out bool untied);
        using NewFolder folder = NewFolder.Create(_request.Out, tensors.Sum(t => t.Bytes));
        CheckpointWriter.Write(folder.Path, tensors);
        if (_request.Adapter is not null && _weights.Replicated is null
            && _changes.Values.All(change => change.Stored == 0))
            throw new InputException($"{_request.Adapter}: merging it changes no value of "
                + $"{_request.Model} as it is stored: was it trained?");
        foreach (var (name, content) in SavedFiles.Read(
            _request.Model, _weights.Spec, Trained(), Storage(), output.WriteLine))
        {
            // What only tells readers how the weights were quantised.
            if (_request.Dequantize && name is "quantize_config.json" or "quant_config.json")
                continue;
            byte[] saved = name == "config.json" ? Configured(content, untied) : content;
            AtomicFile.Write(Path.Combine(folder.Path, name), stream => stream.Write(saved));
        }

        Tell(output);
        if (_request.Check)
            output.WriteLine(LogitCheck.Run(_request.Model, _request.Adapter, folder.Path));
        folder.Place();
        output.WriteLine($"the merged model is in {_request.Out}");
    }

    // A head that is the embedding goes on with the original where the adapter has an embedding of
    // its own, as PEFT has it, or has an adapter; from here on they are two tensors.
    private List<TensorToSave> Tensors(out bool untied)
    {
        var parameters = _weights.Spec.Parameters;
        var tensors = new List<TensorToSave>();
        foreach (StoredTensor tensor in _weights.Checkpoint.Tensors)
        {
            if (_weights.Changes(tensor.Name)) tensors.AddRange(Merged(tensor));
            else if (tensor is PackedTensor) tensors.Add(tensor.ToSave(Storage()));
            else tensors.AddRange(tensor.Pieces.Select(piece => piece.ToSave()));
        }

        untied = false;
        foreach (var (module, to) in parameters.Tied)
        {
            string head = module + ".weight";
            if (!_weights.Unties(to + ".weight", head)) continue;
            StoredTensor original = _weights.Checkpoint.Get(to + ".weight").As(head);
            if (_weights.Changes(head)) tensors.AddRange(Merged(original));
            else tensors.Add(original.ToSave());
            untied = true;
        }

        return tensors;
    }

    private IEnumerable<TensorToSave> Merged(StoredTensor tensor)
    {
        var change = _changes[tensor.Name] = new WeightChange();
        long begin = 0;
        return tensor.Pieces.Select(piece =>
        {
            begin += piece.Count;
            return Merged(tensor, piece, begin - piece.Count, change);
        });
    }

    private TensorToSave Merged(
        StoredTensor tensor, StoredTensor own, long begin, WeightChange change)
    {
        DType type = tensor is PackedTensor ? Storage() : tensor.Type;
        return new TensorToSave(own.Name, StoredType.Of(type), own.Sizes, stream =>
        {
            // Whole rows, so that a piece has all of its part of B.
            int row = Math.Max(1, checked((int)(own.Count / Math.Max(1, own.Sizes[0]))));
            int piece = (int)Math.Min(own.Count, Math.Max(1, PieceElements / row) * (long)row);
            float[] before = new float[piece], after = new float[piece], stored = new float[piece];
            var bytes = new byte[piece * type.Size()];
            for (long done = 0; done < own.Count; done += piece)
            {
                int count = (int)Math.Min(piece, own.Count - done);
                Span<float> was = before.AsSpan(0, count), now = after.AsSpan(0, count);
                _weights.Read(tensor, begin + done, now, was);
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
        if (_request.Dequantize)
            output.WriteLine(
                $"{_weights.Checkpoint.Tensors.Count(t => t is PackedTensor)} quantised tensors "
                + $"are written as {Storage()}");
        if (_request.Adapter is null) return;
        output.WriteLine($"the adapter has {_changes.Count} of {_weights.Checkpoint.Tensors.Count} "
            + "tensors; largest and mean change of a value, and how many are others as stored:");
        int width = _changes.Keys.Max(name => name.Length);
        foreach (var (name, change) in _changes)
            output.WriteLine(FormattableString.Invariant(
                $"  {name.PadRight(width)}  {change.Largest,9:0.00E+0}  {change.Mean,9:0.00E+0}  ")
                + FormattableString.Invariant($"{100 * change.Stored,5:0.0} %"));
    }

    // What a run wrote beside its result, or above its checkpoint: how pictures were cut then.
    private TrainArguments? Trained()
    {
        if (_request.Adapter is not { } adapter || TrainWriter.Beside(adapter) is not { } json)
            return null;
        var trained = new TrainArguments();
        return trained with
        {
            MaxSliceNums = json.Find("max_slice_nums")?.Int(1) ?? trained.MaxSliceNums,
            OfficialCompat = json.Find("official_compat")?.Bool() ?? trained.OfficialCompat,
        };
    }

    // The type that most of the model is stored in, what is quantised left aside.
    private DType Storage() => _weights.Checkpoint.Tensors
        .Where(t => t is not PackedTensor && !_weights.Spec.Parameters.IsUntouched(t.Name))
        .GroupBy(t => t.Type).MaxBy(group => group.Sum(t => t.Bytes))!.Key;

    private byte[] Configured(byte[] config, bool untied) => SavedFiles.Edit(config, json =>
    {
        if (untied) json["tie_word_embeddings"] = false;
        bool replicated = _weights.Replicated is { } ranges && Replicate(json, ranges.Layers);
        return json.Remove("quantization_config") || untied || replicated;
    });

    // Layers are written out one by one, each with its own adapter in it.
    private static bool Replicate(JsonObject json, IReadOnlyList<int> layers)
    {
        double before = (double)json["num_hidden_layers"]!;
        json["num_hidden_layers"] = layers.Count;
        // MiniCPM divides it by the root of the layers.
        if (json["scale_depth"] is { } depth)
            json["scale_depth"] = (double)depth * Math.Sqrt(layers.Count / before);
        if (json["layer_types"] is JsonArray types)
            json["layer_types"] = new JsonArray([.. layers.Select(i => types[i]!.DeepClone())]);
        return true;
    }
}
