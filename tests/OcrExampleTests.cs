using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// examples/ocr.json: its settings, rows and model fit; the words that it is tried on are none of
/// those that it learns.
/// </summary>
[TestFixture]
public sealed class OcrExampleTests
{
    [Test]
    public void ItsRowsFitItsModel()
    {
        string folder = Path.Combine(ArchitectureTests.Root, "examples");
        List<string> notices = [];
        TrainArguments arguments = TrainReader.Read(
            [Path.Combine(folder, "ocr.json"), "--device", "cpu"], folder, notices.Add);
        Assert.That(notices, Is.Empty);
        using var model = TunedModel.Open(arguments);
        Assert.That(model.ParameterRanges.List, Has.Count.GreaterThan(50)
            .And.None.Property("Name").Contains("vit_merger"));
        string[] trained = Words(arguments.DataPath!), held = Words(arguments.EvalDataPath!);
        Assert.That(trained, Has.Length.EqualTo(400).And.Unique);
        Assert.That(held, Has.Length.EqualTo(100).And.Unique);
        Assert.That(held.Intersect(trained), Is.Empty);
        var rows = DataRows.Read(arguments.DataPath!, arguments, model.Loaded.Rows);
        var batch = new Batch();
        batch.Clear();
        for (int row = 0; row < 8; row++) rows.Append(row, batch);
        // Seven letters of a place each, and every letter of the answers is one token.
        Assert.That(batch.Slots.Count, Is.EqualTo(8 * 7));
        var trainer = new Trainer(arguments, model);
        double before = trainer.Step(0, [batch], 3e-3).Loss;
        for (int i = 1; i < 5; i++) trainer.Step(i, [batch], 3e-3);
        Assert.That(trainer.Step(5, [batch], 3e-3).Loss, Is.LessThan(0.8 * before));
    }

    private static string[] Words(string file)
    {
        using var json = JsonDocument.Parse(File.ReadAllBytes(file));
        return [.. json.RootElement.EnumerateArray().Select(row =>
            row.GetProperty("conversations")[1].GetProperty("content").GetString()!)];
    }
}
