using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run needs beyond its weights to go on bit for bit: the numbers here, and AdamW's moments
/// and 16-bit weights' masters in optimizer.safetensors. Random numbers are keyed by seed and step
/// and the order of rows by seed and epoch, so that a step number is
/// the whole random state and data position.
/// </summary>
/// <param name="Absent">Numbers of the file's rows without a place in the order.</param>
/// <param name="LeftOut">Numbers of the rows that keep theirs and are left out.</param>
public sealed record RunState(
    int Step, int Updates, int SkippedInARow, long Seed, long DataSeed, int Rows, string DataDigest,
    IReadOnlyList<int>? Absent, IReadOnlyList<int>? LeftOut)
{
    public const string FileName = "run_state.json", OptimizerFile = "optimizer.safetensors";

    private const string First = "first_moment.", Second = "second_moment.", Master = "master.";

    public void Save(string folder, TunedModel model)
    {
        var tensors = new List<TensorToSave>();
        foreach (TunedTensor tensor in model.ParameterRanges.List)
        {
            tensors.Add(
                model.ToSave(First + tensor.Name, model.ParameterRanges.FirstMoment(tensor.Name)));
            tensors.Add(
                model.ToSave(Second + tensor.Name, model.ParameterRanges.SecondMoment(tensor.Name)));
            if (tensor.Type != DType.F32)
                tensors.Add(
                    model.ToSave(Master + tensor.Name, model.ParameterRanges.Master(tensor.Name)));
        }

        SafetensorsWriter.Write(Path.Combine(folder, OptimizerFile), tensors);
        AtomicFile.WriteText(
            Path.Combine(folder, FileName), JsonSerializer.Serialize(this, s_json) + "\n");
    }

    /// <summary>
    /// Refuses a checkpoint of Hugging Face's Trainer, whose optimizer state is Python's.
    /// </summary>
    /// <exception cref="InputException">It is one.</exception>
    public static void RequireOurs(string folder)
    {
        string[] theirs = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"];
        if (File.Exists(Path.Combine(folder, FileName))
            || !theirs.Any(name => File.Exists(Path.Combine(folder, name)))) return;
        throw new InputException($"{folder}: is a checkpoint of Hugging Face's Trainer: its "
            + "optimizer, schedule and random state are not read, so a run cannot go on from it; its "
            + "adapter can be started from with lora_weight_path, whole weights with "
            + "model_name_or_path");
    }

    /// <summary>Reads the numbers, and copies the moments and masters into the model.</summary>
    /// <exception cref="InputException">A file is missing, broken, or of another model.</exception>
    public static RunState Load(string folder, TunedModel model)
    {
        JsonValue json = JsonInput.ReadObject(Path.Combine(folder, FileName));
        var state = new RunState(
            json["step"].Int(0, int.MaxValue), json["updates"].Int(0, int.MaxValue),
            json["skipped_in_a_row"].Int(0, int.MaxValue), json["seed"].Long(),
            json["data_seed"].Long(), json["rows"].Int(0, int.MaxValue),
            json["data_digest"].Text(), Numbers("absent"), Numbers("left_out"));
        using var file = SafetensorsFile.Open(Path.Combine(folder, OptimizerFile));
        ParameterRanges trainables = model.ParameterRanges;
        var expected = trainables.List.SelectMany(tensor => Names(tensor)
            .Select(name => new ExpectedTensor(name, tensor.Shape))).ToList();
        TensorMatch.Require(file.Path, file.Tensors, expected, _ => null);
        foreach (TunedTensor tensor in trainables.List)
        {
            Copy(First, trainables.FirstMoment(tensor.Name), tensor.Name);
            Copy(Second, trainables.SecondMoment(tensor.Name), tensor.Name);
            if (tensor.Type != DType.F32) Copy(Master, trainables.Master(tensor.Name), tensor.Name);
        }

        return state;

        // Checkpoints of earlier versions have no such lists.
        int[]? Numbers(string key) =>
            json.Find(key) is { } list ? [.. list.Items().Select(item => item.Int(1))] : null;

        void Copy(string prefix, Tensor to, string name)
        {
            StoredTensor stored = file.Get(prefix + name);
            if (stored.Type != to.Type)
                throw new InputException(
                    $"{file.Path}: {stored.Name} is {stored.Type}, this run keeps "
                    + $"{to.Type} (optim): a run goes on only with the optimizer it was started with");
            stored.MustBeFinite(to.Type);
            model.Device.WriteFloats(to, stored.ToFloats());
        }
    }

    private static readonly JsonSerializerOptions s_json = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        WriteIndented = true,
    };

    private static IEnumerable<string> Names(TunedTensor tensor)
    {
        yield return First + tensor.Name;
        yield return Second + tensor.Name;
        if (tensor.Type != DType.F32) yield return Master + tensor.Name;
    }
}
