using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Train;

/// <summary>What `cpmx trace` was asked for.</summary>
/// <param name="Rows">IDs of rows, or their numbers.</param>
/// <param name="Out">The safetensors file to write.</param>
/// <param name="Gradients">Whether gradients are written too.</param>
public sealed record TraceRequest(IReadOnlyList<string> Rows, string Out, bool Gradients);

/// <summary>`cpmx trace`: the named rows as one batch through the configured model.</summary>
public static class TraceRun
{
    /// <exception cref="InputException">What the user gave cannot be used.</exception>
    /// <exception cref="RunException">The file cannot be written.</exception>
    public static void Run(TrainArguments arguments, TraceRequest request, TextWriter output)
    {
        string folder = arguments.ModelNameOrPath!;
        RowFormat format = ModelSpec.Read(folder).Hearing(arguments.InitAudio).Rows();
        DataRows rows = DataRows.Read(arguments.DataPath!, arguments, format);
        var batch = new Batch();
        batch.Clear();
        foreach (string id in request.Rows)
        {
            int row = rows.Find(id);
            if (row < 0)
            {
                BadRow? bad =
                    rows.Unreadable.FirstOrDefault(b => b.Id == id || $"{b.Place}" == id);
                throw new InputException(bad?.ToString()
                    ?? $"{arguments.DataPath}: no row has the id or number \"{id}\"");
            }

            try
            {
                rows.Append(row, batch);
            }
            catch (BadRowException bad)
            {
                throw new InputException(bad.Message, bad);
            }
        }

        // Blocks that run again would hide gradients inside them; a trace is small enough without.
        using var model = TunedModel.Open(
            arguments with { GradientCheckpointing = false }, say: output.WriteLine);
        Trace trace = Trace.Run(model, batch, request.Gradients);
        trace.Save(request.Out);
        output.WriteLine($"{request.Out}: {trace.Floats.Count + trace.Ints.Count} tensors of "
            + $"{request.Rows.Count} row(s), loss {trace.Floats["loss"].Values[0]:R}");
    }
}
