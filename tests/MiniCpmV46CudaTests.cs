using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Engine.Data.Text;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// MiniCPM-V 4.6's reference model and its successors' on the GPU, on a row with a small picture
/// and one without, against the same model in float64: in F32 with the bars of the CPU, or by the
/// rule of the operations, at most twice as far off as the CPU, which equals transformers, and
/// 1e-5. Rows are short, so what the first tokens read from a state may be small against what it is
/// made of, and is normalised: both are further off there. In BF16 a tensor may be as far off as in
/// <see cref="FamilyCudaTests"/>, or a few times as far as the CPU's own when every weight is moved
/// by the rounding of its type, 2^-9.
/// </summary>
[TestFixture]
public sealed class MiniCpmV46CudaTests
{
    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("v46", false)]
    [TestCase("v46", true)]
    [TestCase("v47", false)]
    [TestCase("ocr", false)]
    public void WhatTheCpuComputesIsReached(string family, bool bf16)
    {
        using var gpu = new CudaSource();
        TrainArguments arguments = family switch
        {
            "v46" => V46.Full,
            "v47" => V46.Full with { ModelNameOrPath = CanvasPlacesTests.ModelAsV47(_folder) },
            _ => NativeCase.Of(family).Full,
        };
        using var cpu = TunedModel.Open(arguments);
        using var model = TunedModel.Open(
            arguments with { Bf16 = bf16, Device = DeviceChoice.Cuda }, gpu.Source);
        Trace expected = Trace.Run(cpu, Small(cpu.Loaded.Rows), gradients: true);
        Trace? moved = bf16 ? Moved(arguments, 1f / 512) : null;
        var exact = DoubleModel.Run(arguments.ModelNameOrPath!, Small);
        Trace trace = Trace.Run(model, Small(model.Loaded.Rows), gradients: true);
        Assert.That(trace.Floats.Keys, Is.EquivalentTo(expected.Floats.Keys));
        var worst = (Name: "", Error: 0.0);
        foreach (var (name, (_, values)) in expected.Floats)
        {
            bool isGradient = name.StartsWith("grad.", StringComparison.Ordinal);
            if (isGradient && V26.IsKeyBias(name["grad.".Length..])) continue;
            double[] wanted = exact[name];
            float[] got = trace.Floats[name].Values;
            double error = Error(got);
            double bar = (bf16, name == "loss", isGradient) switch
            {
                (true, true, _) => 1.0 / 128,
                (true, _, true) => 9.0 / 256,
                (true, _, _) => 4.0 / 256,
                (_, _, true) => 1e-4,
                _ => 1e-5,
            };
            bar = Math.Max(bar, moved is null
                ? (2 * Error(values)) + 1e-5 : 3 * Error(moved.Floats[name].Values));
            if (error / bar > worst.Error) worst = (name, error / bar);
            if (error > bar / 2) TestContext.Out.WriteLine($"{name}: {error:E2}, bar {bar:E1}");

            double Error(float[] found) => bf16 || isGradient
                ? V26.NormError(found, wanted) : V26.LargestError(found, wanted);
        }

        TestContext.Out.WriteLine($"worst {worst.Name}: {worst.Error:0.000} of its bar");
        Assert.That(worst.Error, Is.LessThan(1), worst.Name);
    }

    private static Trace Moved(TrainArguments arguments, float unit)
    {
        using var model = TunedModel.Open(arguments);
        foreach (TunedTensor tensor in model.ParameterRanges.List)
            model.ParameterRanges.Write(tensor.Name,
                [.. model.Device.ReadFloats(model.ParameterRanges.Value(tensor.Name)).Select((v, i) =>
                    v * (1 + (V46.Sign(i) * unit)))]);
        return Trace.Run(model, Small(model.Loaded.Rows), gradients: true);
    }

    private static Batch Small(RowFormat format)
    {
        var plan = new SlicePlan(new PictureSize(112, 56), 0, 0, default);
        var batch = new Batch();
        batch.Clear();
        Add($"{format.Placeholders.Text(plan, 0)}\nSame?", "Yes.");
        using var picture = new Picture(112, 56);
        for (int y = 0; y < 56; y++)
        {
            Span<byte> row = picture.Row(y);
            for (int x = 0; x < row.Length; x++)
                row[x] = (byte)(127.5 + (100 * Math.Sin((x * 0.11) + (y * 0.07 * (x % 3)))));
        }

        batch.TryAddPicture(
            format.NewStrips(), picture, plan, format.Placeholders.Features(plan));
        Add("Sure?", "No.");
        return batch;

        void Add(string question, string answer)
        {
            EncodedChat chat = format.Prompts.Encode(
                [new ChatTurn("user", question), new ChatTurn("assistant", answer)]);
            int[] labels = format.Prompts.Labels(chat.Ids, chat.Answer);
            for (int t = 0; t < labels.Length; t++)
                if (labels[t] != PromptFormat.Ignored)
                {
                    batch.LabelRows.Add(batch.Tokens.Count + t);
                    batch.Targets.Add(labels[t]);
                }

            ImageBound[] bounds = format.Placeholders.Bounds(chat.Ids)!;
            batch.AddRow(chat.Ids, bounds,
                places: format.Places(chat.Ids, bounds.Select(_ => plan)));
        }
    }
}
