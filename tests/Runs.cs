using System.Text.Json;
using System.Text.Json.Nodes;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;

namespace MiniCpmNative.Tests;

/// <summary>Whole training runs on rows of the reference, in this process.</summary>
internal static class Runs
{
    /// <summary>LoRA on a row of text alone, which is written into the folder, as the results
    /// are.</summary>
    public static TrainArguments OneRow(string folder)
    {
        string data = Path.Combine(folder, "text.json");
        File.WriteAllText(data, """
            [{"conversations": [{"role": "user", "content": "Count."},
              {"role": "assistant", "content": "1 2"}]}]
            """);
        return V26.Lora with
        {
            OfficialCompat = false,
            DataPath = data,
            OutputDir = Path.Combine(folder, "out"),
        };
    }

    /// <summary>
    /// A data file with these reference rows in this order; it finds their pictures.
    /// </summary>
    public static string Data(string folder, params string[] ids) =>
        DataOf(V26.Rows, folder, ids);

    /// <summary>The same with the rows of another file.</summary>
    public static string DataOf(string file, string folder, params string[] ids)
    {
        JsonArray all = JsonNode.Parse(File.ReadAllBytes(file))!.AsArray();
        var rows = new JsonArray();
        foreach (string id in ids)
        {
            JsonNode row = all.First(r => (string?)r!["id"] == id)!.DeepClone();
            JsonNode image = row["image"]!;
            if (image.GetValueKind() == JsonValueKind.String)
                row["image"] = Absolute(file, (string)image!);
            else
                foreach (string tag in image.AsObject().Select(p => p.Key).ToList())
                    image[tag] = Absolute(file, (string)image[tag]!);
            rows.Add(row);
        }

        string path = Path.Combine(folder, "rows.json");
        File.WriteAllText(path, rows.ToJsonString());
        return path;
    }

    /// <summary>Trains; what the run says is returned.</summary>
    public static string Train(
        TrainArguments arguments, StopRequest? stop = null, StringWriter? screen = null,
        DeviceSource? devices = null)
    {
        screen ??= new StringWriter();
        using var log = new TrainLog(screen, isTerminal: false, () => 80, TimeProvider.System);
        TrainRun.Run(arguments, log, stop ?? new StopRequest(), devices ?? DeviceSource.Default);
        return screen.ToString();
    }

    /// <summary>The log_history of a run that has ended.</summary>
    public static IReadOnlyList<JsonElement> History(TrainArguments arguments)
    {
        using var state = JsonDocument.Parse(
            File.ReadAllBytes(Path.Combine(arguments.OutputDir, "trainer_state.json")));
        return [.. state.RootElement.GetProperty("log_history").EnumerateArray()
            .Select(e => e.Clone())];
    }

    /// <summary>The logged losses of a run that has ended.</summary>
    public static IEnumerable<double> Losses(TrainArguments arguments) => History(arguments)
        .Where(e => e.TryGetProperty("loss", out _)).Select(e => e.GetProperty("loss").GetDouble());

    private static string Absolute(string file, string picture) =>
        Path.GetFullPath(Path.Combine(Path.GetDirectoryName(file)!, picture));
}
