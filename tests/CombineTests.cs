using System.Text.Json;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>`cpmx combine` against PEFT 0.21's add_weighted_adapter.</summary>
[TestFixture]
public sealed class CombineTests
{
    private static readonly string s_members =
        Path.Combine(ReferenceFile.Root, "adapters", "weighted");

    private string _folder = "";

    private string Out => Path.Combine(_folder, "out");

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    [TestCase("linear")]
    [TestCase("linear_ones")]
    [TestCase("linear_negative")]
    [TestCase("linear_single")]
    [TestCase("cat")]
    [TestCase("svd")]
    [TestCase("svd_three")]
    [TestCase("svd_negative")]
    public void SumsAreThoseOfPeft(string name)
    {
        JsonElement expected = ReferenceText.Json("adapters/weighted.json").GetProperty(name);
        List<string> args = ["combine"];
        foreach (var member in expected.GetProperty("adapters").EnumerateArray())
            args.Add(Path.Combine(s_members, member.GetString()!));
        args.Add("--weights=" + string.Join(
            ',', expected.GetProperty("weights").EnumerateArray().Select(w => w.GetRawText())));
        args.AddRange(["--kind", expected.GetProperty("combination_type").GetString()!]);
        if (expected.TryGetProperty("svd_rank", out var rank))
            args.AddRange(["--rank", rank.GetRawText()]);
        Assert.That(Run([.. args]), Does.Contain("adapters, combined by "));
        using var made = AdapterFile.Open(Out);
        JsonElement config = expected.GetProperty("config");
        Assert.That((made.Config.Rank, made.Config.Alpha), Is.EqualTo(
            (config.GetProperty("r").GetInt32(), config.GetProperty("lora_alpha").GetDouble())));
        var stored = made.Match(V26.Spec.Parameters);
        foreach (var module in expected.GetProperty("delta").EnumerateObject())
        {
            StoredTensor a = stored[module.Name + ".lora_A.weight"];
            StoredTensor b = stored[module.Name + ".lora_B.weight"];
            float[] right = a.ToFloats(), left = b.ToFloats();
            int inputs = a.Shape[1], count = a.Shape[0];
            var delta = new float[b.Shape[0] * inputs];
            for (int i = 0; i < delta.Length; i++)
            {
                double sum = 0;
                for (int k = 0; k < count; k++)
                    sum += (double)left[(i / inputs * count) + k]
                        * right[(k * inputs) + (i % inputs)];
                delta[i] = (float)sum;
            }

            var wanted = Fingerprint.Read(module.Value);
            Assert.That(Fingerprint.Of(delta, wanted.Shape).NormError(wanted),
                Is.LessThan(1e-5), module.Name);
        }
    }

    [Test]
    public void TwoSideBySideAreBothAtOnce()
    {
        Run("combine", Path.Combine(s_members, "first"), Path.Combine(s_members, "third"));
        using var model = TunedModel.Open(AdapterSettings.Complete(
            V26.Lora with { LoraWeightPath = Out }, key => key == "modules_to_save"));
        Trace trace = Trace.Run(model, V26.Batch(V26.Full, "one", "two-small"), gradients: false);
        V26.AssertClose("logits", trace.Floats["logits"],
            ReferenceText.Json("adapters/weighted.json").GetProperty("active_first_third")
                .GetProperty("logits"), 1e-5);
    }

    [TestCase("first third --kind linear", 2, "has rank 8 in ")]
    [TestCase("first second --weights 1", 2, "--weights has 1 numbers, expected 2, one for each")]
    [TestCase("first --weights a", 2, "--weights has \"a\", expected numbers as 0.7,0.3")]
    [TestCase("first --kind ties", 2, "--kind is \"ties\", expected cat, svd or linear")]
    [TestCase("first second --kind dare_linear", 2,
        "--kind is \"dare_linear\", expected cat, svd or linear")]
    [TestCase("first --kind 1", 2, "--kind is \"1\", expected cat, svd or linear")]
    [TestCase("first --rank 4", 2, "--rank is svd's")]
    [TestCase("first second first second first second first second first second first second"
        + " first second first second first --kind svd", 2, "sum to 136, more than it has")]
    [TestCase("", 2, "combine: expected the adapters' folders, got none")]
    public void WhatCannotBeCombinedIsNamed(string given, int code, string expected)
    {
        string[] args = [.. given.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(
            arg => arg is "first" or "second" or "third" ? Path.Combine(s_members, arg) : arg)];
        var error = new StringWriter();
        Assert.That(new CommandLine(new StringWriter(), error, new Runners()).Run(
            ["combine", .. args, "--out", Out]), Is.EqualTo(code));
        Assert.That(error.ToString(), Does.Contain(expected));
        Assert.That(error.ToString().Trim(), Does.Not.Contain("\n"));
        Assert.That(Directory.Exists(Out), Is.False);
    }

    [TestCase("variant_dora", "has magnitudes (use_dora), which have no sum")]
    [TestCase("variant_bias_all", "not what was trained beside them")]
    public void OnlyPlainAdaptersAreCombined(string name, string expected) => Assert.That(
        () => Run("combine", V26.Adapter(name)), SafetensorsTests.Refuses(expected));

    private string Run(params string[] args)
    {
        var (output, error) = (new StringWriter(), new StringWriter());
        int code = new CommandLine(output, error, new Runners()).Run([.. args, "--out", Out]);
        if (code != 0) throw new InputException(error.ToString().Trim());
        return output.ToString();
    }
}
