using System.Diagnostics;
using System.Globalization;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Generate;

namespace MiniCpmNative.Bench;

/// <summary>
/// bench generate MODEL [DEVICE]: time of a prompt and of the tokens behind it, greedy, for one
/// answer and for 16 at once; and what that is of memory, since a token alone can do no better than
/// to read the decoder's weights once. Prompts are of any tokens, without pictures.
/// </summary>
internal static class GenerateBench
{
    private const int Prompt = 256, Answer = 64;

    public static void Run(string[] args)
    {
        var arguments = new TrainArguments
        {
            ModelNameOrPath = args[0],
            Device = args.Length > 1
                ? Enum.Parse<DeviceChoice>(args[1], ignoreCase: true) : default,
            Bf16 = true,
        };
        using AskedModel model = AskedModel.Open(arguments, null, say: Console.WriteLine);
        // All of them but the embeddings, of which rows are read.
        double bytes = model.Model.Spec.Parameters.All
            .Where(p => p.Name.StartsWith("llm.", StringComparison.Ordinal)
                && (model.Model.Spec.Decoder.TiedHead || !p.Name.Contains("embed_tokens")))
            .Sum(p => 2.0 * p.Shape.Count);
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
            $"{model.Model.DeviceName}; {bytes / 1e9:0.000} GB of bfloat16 weights a token"));
        var generator = new Generator(model.Model);
        int vocabulary = model.Model.Spec.Decoder.VocabSize;
        foreach (int batch in (int[])[1, 16])
        {
            GenerationInput[] inputs = [.. Enumerable.Range(0, batch).Select(row => new
                GenerationInput(Prompt, to => to.AddRow([.. Enumerable.Range(0, Prompt)
                    .Select(i => (int)(((31L * i) + (97 * row) + 7) % vocabulary))], [])))];
            var settings = new GenerationSettings { MaxNewTokens = Answer };
            double first = double.MaxValue, rest = double.MaxValue;
            // The first round warms up.
            for (int round = 0; round < 4; round++)
            {
                long start = Stopwatch.GetTimestamp(), begun = 0;
                int said = 0;
                generator.Run(inputs, settings, (_, _) =>
                {
                    if (++said == batch) begun = Stopwatch.GetTimestamp();
                    return true;
                });
                if (round == 0) continue;
                first = Math.Min(first, Stopwatch.GetElapsedTime(start, begun).TotalSeconds);
                rest = Math.Min(rest, Stopwatch.GetElapsedTime(begun).TotalSeconds);
            }

            double step = rest / (Answer - 1);
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture,
                $"batch {batch,2}: prompts of {Prompt} tokens {first / batch * 1e3:0.0} ms each; ")
                + string.Create(CultureInfo.InvariantCulture,
                    $"{step * 1e3:0.00} ms a step, {batch / step:0} tokens/s, ")
                + string.Create(CultureInfo.InvariantCulture,
                    $"weights at {bytes / step / 1e9:0.0} GB/s"));
        }
    }
}
