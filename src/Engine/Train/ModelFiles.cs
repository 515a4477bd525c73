using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run produces, in the form others read: with use_lora a PEFT adapter, else the whole model
/// in Hugging Face's layout, with the tokenizer and configuration files of the model it started
/// from (see <see cref="BaseModel"/>).
/// </summary>
public static class ModelFiles
{
    // A checkpoint without the frozen weights, which no other program takes for a model.
    private const string TrainedOnly = "trained.safetensors";

    /// <summary>Writes the adapter or the whole model into a folder.</summary>
    /// <returns>
    /// The names of the files; none when the model's frozen weights are no longer those that were
    /// trained with, so that no whole model can be written.
    /// </returns>
    /// <exception cref="RunException">A file cannot be written.</exception>
    public static IReadOnlyList<string> Save(
        string folder, TunedModel model, TrainArguments arguments)
    {
        BaseModel source = model.Base;
        var written = new List<string>();
        if (arguments.UseLora)
        {
            AdapterConfig own = model.Parts.Config!, config = own.AsSaved();
            AdapterLayout layout = ReferenceEquals(config, own) ? model.Parts.Layout!
                : AdapterLayout.Create(source.Spec.Parameters, config, folder);
            AdapterFile.Write(folder, config, layout, model.Trained());
            written.AddRange([AdapterFile.WeightsName, AdapterConfig.FileName]);
            WriteSmall(folder, source, written);
            return written;
        }

        try
        {
            written.AddRange(CheckpointWriter.Write(
                folder, [.. source.Spec.Parameters.All.SelectMany(
                        expected => Pieces(model, source.Weights.Get(expected.Name))),
                    .. source.Untouched.SelectMany(tensor => tensor.Pieces)
                        .Select(tensor => tensor.ToSave())]));
        }
        catch (InputException) when (source.HasChanged)
        {
            return [];
        }

        WriteSmall(folder, source, written);
        return written;
    }

    private static void WriteSmall(string folder, BaseModel source, List<string> written)
    {
        foreach (var (name, content) in source.Saved)
        {
            AtomicFile.Write(Path.Combine(folder, name), stream => stream.Write(content));
            written.Add(name);
        }
    }

    /// <summary>
    /// Writes a checkpoint's model: as <see cref="Save"/>, or what was trained alone.
    /// </summary>
    /// <returns>Whether it is whole.</returns>
    /// <exception cref="RunException">A file cannot be written.</exception>
    public static bool SaveCheckpoint(
        string folder, TunedModel model, TrainArguments arguments)
    {
        if (Save(folder, model, arguments).Count > 0) return true;
        SafetensorsWriter.Write(Path.Combine(folder, TrainedOnly), [.. model.Trained()]);
        return false;
    }

    /// <summary>Reads a checkpoint's trained values back into the model.</summary>
    /// <exception cref="InputException">The checkpoint does not fit the configuration.</exception>
    public static void Load(string folder, TunedModel model, TrainArguments arguments)
    {
        if (arguments.UseLora)
        {
            using AdapterFile adapter = AdapterFile.Open(folder);
            model.CopyFrom(adapter);
            return;
        }

        string trained = Path.Combine(folder, TrainedOnly);
        if (File.Exists(trained))
        {
            using var file = SafetensorsFile.Open(trained);
            TensorMatch.Require(trained, file.Tensors,
                [.. model.ParameterRanges.List.Select(t => new ExpectedTensor(t.Name, t.Shape))]);
            foreach (TunedTensor tensor in model.ParameterRanges.List)
                model.ParameterRanges.Write(tensor.Name, file.Get(tensor.Name).ToFloats());
            return;
        }

        using Checkpoint checkpoint = Checkpoint.Open(folder);
        checkpoint.MustMatch(model.Spec.Parameters, Families.Explain);
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            model.ParameterRanges.Write(tensor.Name, checkpoint.Get(tensor.Name).ToFloats());
    }

    // A tensor in the pieces that it was read in.
    private static IEnumerable<TensorToSave> Pieces(TunedModel model, StoredTensor stored)
    {
        if (!model.ParameterRanges.Contains(stored.Name))
            return stored.Pieces.Select(piece => piece.ToSave(model.Base.Storage));
        Tensor value = model.ParameterRanges.Value(stored.Name);
        nint offset = 0;
        return stored.Pieces.Select(piece =>
        {
            var part = new Tensor(value.Data + offset, new Spec(value.Type, piece.Shape));
            offset += (nint)part.Spec.Bytes;
            return model.ToSave(piece.Name, part);
        });
    }
}
