using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// What must be as it was for a run to go on bit for bit: settings, base model, random draws; and
/// what is only said: the run's length, the processor. allow_changes names what may differ.
/// </summary>
internal sealed class ResumeRules(
    string folder, RunState before, TrainArguments arguments, Action<string> say)
{
    private const string DataKey = "data_path", ModelKey = "model_name_or_path",
        DropoutKey = "lora_dropout";

    private bool Allows(string key) => arguments.AllowChanges?.Contains(key) == true;

    /// <summary>The values of all keys that what is trained depends on.</summary>
    public static IReadOnlyDictionary<string, JsonElement> Settings(TrainArguments arguments)
    {
        TrainArguments resolved =
            arguments with { DataSeed = arguments.DataSeed ?? arguments.Seed };
        return TrainKeys.Train.Where(key => key.Rule.Binds)
            .ToDictionary(key => key.Name, key => TrainWriter.Element(key, resolved));
    }

    /// <summary>What decides how sums are rounded.</summary>
    public static string Processor(Device device) => device is CudaDevice cuda
        ? $"{cuda.Context.Name}, compute capability {cuda.Context.Architecture / 10.0:0.0}"
        : $"CPU, {Gemm.Best}";

    /// <summary>Whether rows other than those of the checkpoint are taken all the same.</summary>
    /// <param name="now">The digest of this run's rows.</param>
    public bool TakesOtherRows(string now)
    {
        if (before.DataDigest == now || !Allows(DataKey)) return false;
        say($"{arguments.DataPath}: has other rows than {folder} was made with, as {DataKey} in "
            + "allow_changes allows");
        return true;
    }

    /// <exception cref="InputException">Names what differs and how to allow it.</exception>
    public void Check(RunState now)
    {
        if (before.Parts is null)
            say($"{folder}: was saved by an earlier version of cpmx, which did not record its "
                + "settings, model and files: they are not checked");
        CheckSettings(now);
        if (before.Model is not null && before.Model != now.Model)
            Refuse(ModelKey, $"was made with another base model than {arguments.ModelNameOrPath} "
                + "is now (weights, config.json, tokenizer or processor file)");
        int draws = before.Draws ?? 1;
        if (draws != now.Draws && arguments.LoraDropout > 0 && arguments.UseLora)
            Refuse(DropoutKey, "was made by a version of cpmx whose dropout draws other random "
                + $"numbers ({draws}, this one {now.Draws})");
        if (before.Processor is { } processor && processor != now.Processor)
            say($"{folder}: was made on {processor}; on {now.Processor} sums are rounded "
                + "otherwise, so the run does not go on bit for bit");
        if (before.MaxSteps is { } steps && steps != now.MaxSteps)
            say($"{folder}: its run was to have {steps:N0} steps, this one has {now.MaxSteps:N0}: "
                + "learning rates follow the new length");
    }

    private void CheckSettings(RunState now)
    {
        var plain = Settings(new TrainArguments());
        List<string> changed = [], refused = [];
        foreach (var (key, value) in now.Settings!)
        {
            // A key that the version that saved did not have.
            JsonElement old = before.Settings is null ? value
                : before.Settings.TryGetValue(key, out JsonElement its) ? its : plain[key];
            if (JsonElement.DeepEquals(old, value)) continue;
            string line = $"{key} {Shown(old)}, this run has {Shown(value)}";
            changed.Add(line);
            if (!Allows(key)) refused.Add(key);
        }

        if (changed.Count == 0) return;
        string was = $"{folder}: was made with {string.Join("; ", changed)}";
        if (refused.Count > 0)
            throw new InputException($"{was}: the run would not go on bit for bit; give the old "
                + $"values, or allow them to change: --allow_changes {string.Join(' ', refused)}");
        say($"{was}, as allow_changes allows: it does not go on bit for bit");
    }

    private void Refuse(string key, string what)
    {
        string line = $"{folder}: {what}: the run does not go on bit for bit";
        if (!Allows(key))
            throw new InputException($"{line}; if it may, --allow_changes {key}");
        say($"{line}, as allow_changes allows");
    }

    private static string Shown(JsonElement value) => value.ValueKind == JsonValueKind.String
        ? Messages.OneLine(value.GetString()!) : Messages.OneLine(value.GetRawText());
}
