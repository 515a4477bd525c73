using System.Text.Json;
using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// trainer_state.json with the keys of the Hugging Face Trainer. Numbers are not rounded; NaN and
/// Inf, which JSON lacks, are null. What a resumed run needs to go on with an unfinished logging
/// interval stands in stateful_callbacks under "cpmx". Of a long run it has the newest entries, so
/// that a checkpoint takes no longer the longer the run is; train_log.jsonl has all of them.
/// </summary>
internal sealed class LogState
{
    public const string FileName = "trainer_state.json";

    /// <summary>Most entries of log_history: some 2 MB.</summary>
    public const int MostEntries = 10_000;

    // What runs have written that kept all entries.
    private const long MostBytes = 1L << 30;

    private readonly Queue<LogEntry> _history = [];

    /// <summary>Steps done when the state was saved.</summary>
    public int Step { get; private init; }

    public long TokensSeen { get; set; }

    /// <summary>Sum of the losses since the last entry, and their number.</summary>
    public (double Sum, int Count) Pending { get; set; }

    /// <summary>Sum of the losses of the whole run, and their number.</summary>
    public (double Sum, int Count) Total { get; set; }

    /// <summary>The best checkpoint so far, and its value; null without one.</summary>
    public (int Step, double Value)? Best { get; private set; }

    /// <summary>Takes a checkpoint that is about to be saved as the best one if it is.</summary>
    public void Consider(int step, TrainArguments arguments)
    {
        if (arguments.BestBy is not { } metric) return;
        bool more = arguments.GreaterIsBetter ?? metric != TrainLog.EvaluationLoss;
        foreach (var (name, value) in _history.Where(entry => entry.Step == step)
            .SelectMany(entry => entry.Values))
            if (name == metric && double.IsFinite(value)
                && (Best is not { } best || (more ? value > best.Value : value < best.Value)))
                Best = (step, value);
    }

    public void Add(LogEntry entry)
    {
        if (_history.Count == MostEntries) _history.Dequeue();
        _history.Enqueue(entry);
    }

    public bool HasEvaluation(int step) => _history.Any(entry => entry.Step == step
        && entry.Values.Any(value => value.Name == TrainLog.EvaluationLoss));

    /// <exception cref="RunException">The file cannot be written.</exception>
    public void Save(string folder, int step, RunReport run) =>
        AtomicFile.Write(Path.Combine(folder, FileName), stream =>
        {
            using (var json = new Utf8JsonWriter(stream, new JsonWriterOptions { Indented = true }))
                Write(json, step, run);
            stream.WriteByte((byte)'\n');
        });

    /// <summary>Reads the state of the checkpoint that a run goes on from.</summary>
    /// <exception cref="InputException">Missing or not as cpmx writes it.</exception>
    public static LogState Load(string folder)
    {
        var root = JsonInput.ReadObject(Path.Combine(folder, FileName), MostBytes);
        var state = new LogState
        {
            Step = root["global_step"].Int(0),
            TokensSeen = root["num_input_tokens_seen"].Long(0),
            Best = root.Find("best_global_step") is { } best
                && root.Find("best_metric") is { } metric
                ? (best.Int(0), metric.Number()) : null,
        };
        foreach (var entry in root["log_history"].Items())
        {
            var values = new List<(string, double)>();
            foreach (var (name, value) in entry.Members())
            {
                if (name is "step" or "epoch") continue;
                bool isNull = value.Element.ValueKind == JsonValueKind.Null;
                values.Add((name, isNull ? double.NaN : value.Number()));
            }

            state.Add(new LogEntry(entry["step"].Int(0), entry["epoch"].Number(), [.. values], []));
        }

        var own = root["stateful_callbacks"]["cpmx"];
        state.Pending = (own["loss_sum"].Number(), own["loss_count"].Int(0));
        state.Total = (own["total_loss_sum"].Number(), own["total_loss_count"].Int(0));
        return state;
    }

    public static void WriteNumber(Utf8JsonWriter json, string name, double value)
    {
        if (double.IsFinite(value)) json.WriteNumber(name, value);
        else json.WriteNull(name);
    }

    private void Write(Utf8JsonWriter json, int step, RunReport run)
    {
        var plan = run.Plan;
        json.WriteStartObject();
        if (Best is { } best)
        {
            json.WriteNumber("best_global_step", best.Step);
            json.WriteNumber("best_metric", best.Value);
            json.WriteString("best_model_checkpoint",
                RunFolder.Checkpoint(run.Arguments.OutputDir, best.Step));
        }
        else
        {
            json.WriteNull("best_global_step");
            json.WriteNull("best_metric");
            json.WriteNull("best_model_checkpoint");
        }

        json.WriteNumber("epoch", plan.EpochAfter(step));
        json.WriteNumber("eval_steps", plan.Every.Evaluation);
        json.WriteNumber("global_step", step);
        json.WriteBoolean("is_hyper_param_search", false);
        json.WriteBoolean("is_local_process_zero", true);
        json.WriteBoolean("is_world_process_zero", true);
        json.WriteStartArray("log_history");
        foreach (var entry in _history)
        {
            json.WriteStartObject();
            json.WriteNumber("epoch", entry.Epoch);
            foreach (var (name, value) in entry.Values) WriteNumber(json, name, value);
            json.WriteNumber("step", entry.Step);
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteNumber("logging_steps", plan.Every.Logging);
        json.WriteNumber("max_steps", plan.MaxSteps);
        json.WriteNumber("num_input_tokens_seen", TokensSeen);
        json.WriteNumber("num_train_epochs", plan.Epochs);
        json.WriteNumber("save_steps", plan.Every.Saving);
        json.WriteStartObject("stateful_callbacks");
        json.WriteStartObject("cpmx");
        json.WriteNumber("loss_sum", Pending.Sum);
        json.WriteNumber("loss_count", Pending.Count);
        json.WriteNumber("total_loss_sum", Total.Sum);
        json.WriteNumber("total_loss_count", Total.Count);
        json.WriteEndObject();
        json.WriteEndObject();
        // The Trainer's estimate: two floating-point operations per parameter forward, four
        // backward.
        json.WriteNumber("total_flos", 6.0 * TokensSeen * run.Parameters);
        json.WriteNumber("train_batch_size", run.Arguments.PerDeviceTrainBatchSize);
        json.WriteNull("trial_name");
        json.WriteNull("trial_params");
        json.WriteEndObject();
    }
}
