using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What a run needs beyond its weights to go on bit for bit: the numbers here, and what the
/// optimizer keeps, with 16-bit weights' masters, in optimizer.safetensors. Random numbers are
/// keyed by seed and step and the order of rows by seed and epoch, so that a step number is the
/// whole random state and data position.
/// </summary>
/// <param name="Absent">Numbers of the file's rows without a place in the order.</param>
/// <param name="LeftOut">Numbers of the rows that keep theirs and are left out.</param>
public sealed record RunState(
    int Step, int Updates, int SkippedInARow, long Seed, long DataSeed, int Rows, string DataDigest,
    IReadOnlyList<int>? Absent, IReadOnlyList<int>? LeftOut)
{
    public const string FileName = "run_state.json", OptimizerFile = "optimizer.safetensors";

    /// <summary>Steps that the run was to have.</summary>
    public int? MaxSteps { get; init; }

    /// <summary>What the run computed on; others round otherwise.</summary>
    public string? Processor { get; init; }

    /// <summary><see cref="BaseModel.Identity"/>.</summary>
    public string? Model { get; init; }

    /// <summary><see cref="Philox.Version"/>; null means 1.</summary>
    public int? Draws { get; init; }

    /// <summary>Keys that what is trained depends on, and their values.</summary>
    public IReadOnlyDictionary<string, JsonElement>? Settings { get; init; }

    /// <summary>Digests of the files that a run goes on from, this one left out.</summary>
    public IReadOnlyDictionary<string, string>? Parts { get; init; }

    private const string Master = "master";

    /// <summary>Writes both files, this one last: it names the others of the folder.</summary>
    public void Save(string folder, TunedModel model)
    {
        SafetensorsWriter.Write(Path.Combine(folder, OptimizerFile),
            [.. Kept(model.ParameterRanges).Select(k => model.ToSave(k.Name, k.Tensor))]);
        RunState whole = this with { Parts = PartsOf(folder) };
        AtomicFile.WriteText(
            Path.Combine(folder, FileName), JsonSerializer.Serialize(whole, s_json) + "\n");
    }

    private static SortedDictionary<string, string> PartsOf(string folder)
    {
        var parts = new SortedDictionary<string, string>(StringComparer.Ordinal);
        foreach (string file in Directory.GetFiles(folder))
            if (Path.GetFileName(file) is var name
                && (name.EndsWith(".safetensors", StringComparison.Ordinal)
                || name is LogState.FileName or AdapterConfig.FileName or Checkpoint.IndexFile))
                parts.Add(name, FileDigest.Of(file));
        return parts;
    }

    /// <summary>Reads the numbers of a checkpoint whose files belong together.</summary>
    /// <exception cref="InputException">
    /// A file is missing, broken, or was not saved with the others.
    /// </exception>
    public static RunState Read(string folder)
    {
        string path = Path.Combine(folder, FileName);
        if (!File.Exists(path) && Directory.Exists(folder))
            throw new InputException($"{path}: there is no such file: a checkpoint without "
                + "optimizer "
                + "state (save_only_model) or of another program, from which no run can go on; "
                + "start from its weights with lora_weight_path or model_name_or_path");
        JsonValue json = JsonInput.ReadObject(path);
        var state = new RunState(
            json["step"].Int(0, int.MaxValue), json["updates"].Int(0, int.MaxValue),
            json["skipped_in_a_row"].Int(0, int.MaxValue), json["seed"].Long(),
            json["data_seed"].Long(), json["rows"].Int(0, int.MaxValue),
            json["data_digest"].Text(), Numbers("absent"), Numbers("left_out"))
        {
            MaxSteps = json.Find("max_steps")?.Int(0),
            Processor = json.Find("processor")?.Text(),
            Model = json.Find("model")?.Text(),
            Draws = json.Find("draws")?.Int(0),
            Settings = json.Find("settings")?.Members()
                .ToDictionary(member => member.Name, member => member.Value.Element),
            Parts = json.Find("parts")?.Members()
                .ToDictionary(member => member.Name, member => member.Value.Text()),
        };
        foreach (var (name, digest) in state.Parts ?? new Dictionary<string, string>())
            if (name.Any(char.IsControl)
                || DigestOf(Path.Combine(folder, Path.GetFileName(name))) != digest)
                throw new InputException($"{folder}: {Messages.OneLine(name)} is not the file that "
                    + "was "
                    + $"saved with {FileName}: a run goes on from files of one save only; put it "
                    + "back, or go on from another checkpoint");
        int step = LogState.Load(folder).Step;
        if (step != state.Step)
            throw new InputException($"{folder}: {LogState.FileName} is of step {step:N0}, "
                + $"{FileName} of step {state.Step:N0}: a run goes on from files of one save only");
        return state;

        // Checkpoints of earlier versions have no such lists.
        int[]? Numbers(string key) =>
            json.Find(key) is { } list ? [.. list.Items().Select(item => item.Int(1))] : null;
    }

    private static string DigestOf(string file)
    {
        using FileStream stream = InputFile.Open(file, buffer: 0);
        return FileDigest.Of(stream.SafeFileHandle);
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
            + "optimizer, schedule and random state are not read, so a run cannot go on from it; "
            + "its adapter can be started from with lora_weight_path, whole weights with "
            + "model_name_or_path");
    }

    /// <summary>Copies the moments and masters into the model.</summary>
    /// <exception cref="InputException">The file is missing, broken, or of another
    /// model.</exception>
    public static void LoadOptimizer(string folder, TunedModel model)
    {
        using var file = SafetensorsFile.Open(Path.Combine(folder, OptimizerFile));
        var kept = Kept(model.ParameterRanges).ToList();
        TensorMatch.Require(file.Path, file.Tensors,
            [.. kept.Select(k => new ExpectedTensor(k.Name, k.Tensor.Shape) { IsAnyType = true })],
            name => model.ParameterRanges.Contains(name[(name.IndexOf('.') + 1)..])
                ? "another optim's" : null);
        foreach (var (name, tensor) in kept) Copy(tensor, name);

        void Copy(Tensor to, string name)
        {
            StoredTensor stored = file.Get(name);
            if (stored.Type != to.Type)
                throw new InputException(
                    $"{file.Path}: {stored.Name} is {stored.Type}, this run keeps "
                    + $"{to.Type} (optim): a run goes on only with the optimizer it was started "
                    + "with");
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
