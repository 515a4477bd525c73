using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run needs beyond its weights to go on bit for bit: the numbers here, and what the
/// optimizer keeps, with 16-bit weights' masters, in optimizer.safetensors. Random numbers are keyed
/// by seed and step and the order of rows by seed and epoch, so that a step number is the whole
/// random state and data position.
/// </summary>
/// <param name="Absent">Numbers of the file's rows without a place in the order.</param>
/// <param name="LeftOut">Numbers of the rows that keep theirs and are left out.</param>
public sealed record RunState(
    int Step, int Updates, int SkippedInARow, long Seed, long DataSeed, int Rows, string DataDigest,
    IReadOnlyList<int>? Absent, IReadOnlyList<int>? LeftOut)
{
    public const string FileName = "run_state.json", OptimizerFile = "optimizer.safetensors";

    private const string Master = "master";

    public void Save(string folder, TunedModel model)
    {
        SafetensorsWriter.Write(Path.Combine(folder, OptimizerFile),
            [.. Kept(model.ParameterRanges).Select(k => model.ToSave(k.Name, k.Tensor))]);
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
        var kept = Kept(model.ParameterRanges).ToList();
        TensorMatch.Require(file.Path, file.Tensors,
            [.. kept.Select(k => new ExpectedTensor(k.Name, k.Tensor.Shape) { IsAnyType = true })],
            name => model.ParameterRanges.Contains(name[(name.IndexOf('.') + 1)..])
                ? "another optim's" : null);
        foreach (var (name, tensor) in kept) Copy(tensor, name);
        return state;

        // Checkpoints of earlier versions have no such lists.
        int[]? Numbers(string key) =>
            json.Find(key) is { } list ? [.. list.Items().Select(item => item.Int(1))] : null;

        void Copy(Tensor to, string name)
        {
            StoredTensor stored = file.Get(name);
            if (stored.Type != to.Type)
                throw new InputException(
                    $"{file.Path}: {stored.Name} is {stored.Type}, this run keeps "
                    + $"{to.Type} (optim): a run goes on only with the optimizer it was started with");
            if (to.Type.IsFloat()) stored.MustBeFinite(to.Type);
            unsafe
            {
                model.Device.Upload(to, (void*)stored.Data);
            }
        }
    }

    private static readonly JsonSerializerOptions s_json = new()
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        WriteIndented = true,
    };

    // As the file names it.
    private static IEnumerable<(string Name, Tensor Tensor)> Kept(ParameterRanges ranges)
    {
        foreach (TunedTensor tensor in ranges.List)
        {
            foreach (var (name, state) in ranges.States(tensor.Name))
                yield return ($"{name}.{tensor.Name}", state);
            if (tensor.Type != DType.F32)
                yield return ($"{Master}.{tensor.Name}", ranges.Master(tensor.Name));
        }
    }
}
