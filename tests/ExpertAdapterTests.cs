using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Export;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Adapters of experts' matrices (PEFT's target_parameters) by the formula, on gradients of the
/// matrices that are transformers' (<see cref="MiniCpmV47ExpertsTests"/>).
/// </summary>
[TestFixture]
public sealed class ExpertAdapterTests
{
    private const int Rank = 3;

    private static readonly string[] s_both =
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"];

    private string _folder = "";

    [SetUp]
    public void CreateFolder() => _folder = Directory.CreateTempSubdirectory("cpmx-test-").FullName;

    [TearDown]
    public void DeleteFolder() => Directory.Delete(_folder, recursive: true);

    // dB = s dW A^T where B is 0, and where it is not, with the model that merge writes, dA = s B^T
    // dW too.
    [Test]
    public void GradientsAndMergedMatricesAreTheFormulas()
    {
        TrainArguments arguments = Arguments(s_both);
        using var model = TunedModel.Open(arguments);
        var batch = V47Experts.Batch(model.Loaded.Rows);
        Adapter[] adapters = [.. model.Parts.Adapters.List.Where(a => a.Experts > 0)];
        Assert.That(adapters, Has.Length.EqualTo(2 * 4));
        using (var full = TunedModel.Open(V47Experts.Full))
            AssertGradients(model, full, adapters, batch, ofA: false);

        var random = new Random(3);
        foreach (Adapter adapter in adapters)
            model.ParameterRanges.Write(adapter.NameOfB, [.. Enumerable.Range(
                0, adapter.RowsOfB * Rank).Select(_ => (float)((0.2 * random.NextDouble()) - 0.1))]);
        ModelFiles.Save(_folder, model, arguments);
        string wide = Path.Combine(_folder, "wide"), merged = Path.Combine(_folder, "merged");
        Directory.CreateDirectory(wide);
        foreach (string file in Directory.GetFiles(V47Experts.Model))
            if (!file.EndsWith(".safetensors", StringComparison.Ordinal))
                File.Copy(file, Path.Combine(wide, Path.GetFileName(file)));
        using (Checkpoint checkpoint = Checkpoint.Open(V47Experts.Model))
            SafetensorsWriter.Write(Path.Combine(wide, Checkpoint.SingleFile),
                [.. checkpoint.Tensors.SelectMany(t => t.Pieces).Select(t => t.ToSave(DType.F32))]);
        MergeRun.Run(new MergeRequest(wide, _folder, merged), TestContext.Out);
        using (var full = TunedModel.Open(V47Experts.Full with { ModelNameOrPath = merged }))
            AssertGradients(model, full, adapters, batch, ofA: true);
        AssertMerged(wide, merged, adapters);

        using var again = TunedModel.Open(AdapterSettings.Complete(
            arguments with { LoraWeightPath = _folder }, key => key == "lora_dropout"));
        foreach (TunedTensor tensor in again.ParameterRanges.List)
            Assert.That(again.Device.ReadFloats(again.ParameterRanges.Value(tensor.Name)), Is.EqualTo(
                model.Device.ReadFloats(model.ParameterRanges.Value(tensor.Name))), tensor.Name);
    }

    [Test]
    public void StepsOnCudaAreThoseOfTheCpu()
    {
        TrainArguments arguments = Arguments(s_both);
        double[] Steps(DeviceSource? devices)
        {
            using var model = TunedModel.Open(arguments with
            {
                Device = devices is null ? DeviceChoice.Cpu : DeviceChoice.Cuda,
            }, devices);
            var batch = V47Experts.Batch(model.Loaded.Rows, 1);
            var trainer = new Trainer(arguments, model);
            return [.. Enumerable.Range(0, 2).SelectMany(i =>
            {
                StepResult result = trainer.Step(i, [batch], 3e-3);
                return (double[])[result.Loss, result.GradientNorm];
            })];
        }

        double[] cpu = Steps(null), gpu;
        using (var emulated = new CudaSource()) gpu = Steps(emulated.Source);
        for (int i = 0; i < cpu.Length; i++)
            Assert.That(gpu[i], Is.EqualTo(cpu[i]).Within(1e-4 * cpu[i]));
        Assert.That(cpu[2], Is.LessThan(cpu[0]));
    }

    [TestCase("mlp.experts.up_proj", "\"mlp.experts.up_proj\" is no matrix of experts; expected "
        + "mlp.experts.gate_up_proj or mlp.experts.down_proj")]
    [TestCase("mlp.experts.down_proj --use_dora true", "on which use_dora is not supported")]
    [TestCase("mlp.experts.down_proj --lora_dropout 0.1", "target_parameters needs lora_dropout=0")]
    [TestCase("mlp.experts.down_proj --modules_to_save mlp.experts",
        "target_parameters and modules_to_save both train ")]
    public void WhatCannotBeIsNamed(string given, string expected) =>
        Assert.That(() => BaseModel.Open(TrainReader.Read(
            ["--use_lora", "--tune_llm", "false", "--model_name_or_path", V47Experts.Model,
                "--data_path", V26.Rows, "--lora_dropout", "0", "--lora_target_modules", "[\"q_proj\"]",
                "--target_parameters", .. given.Split(' ')], _folder)),
            Throws.TypeOf<InputException>().With.Message.Contains(expected));

    private static TrainArguments Arguments(IReadOnlyList<string> parameters) => V47Experts.Lora with
    {
        LoraR = Rank,
        LoraAlpha = 2 * Rank,
        TargetParameters = parameters,
    };

    private static void AssertGradients(TunedModel model, TunedModel full, Adapter[] adapters,
        Engine.Data.Batch batch, bool ofA)
    {
        StepResult own = V26.Gradients(model, V47Experts.Lora, batch),
            whole = V26.Gradients(full, V47Experts.Full, batch);
        Assert.That(own.Loss, Is.EqualTo(whole.Loss).Within(1e-5 * whole.Loss));
        foreach (Adapter adapter in adapters)
        {
            double[] dw = Doubles(V26.Gradient(full, adapter.Module)),
                a = Doubles(model.Device.ReadFloats(model.ParameterRanges.Value(adapter.NameOfA))),
                b = Doubles(model.Device.ReadFloats(model.ParameterRanges.Value(adapter.NameOfB)));
            var (rows, cols) = (adapter.Outputs, adapter.Inputs);
            double[] da = new double[a.Length], db = new double[b.Length];
            for (int e = 0; e < adapter.Experts; e++)
                for (int o = 0; o < rows; o++)
                    for (int k = 0; k < Rank; k++)
                        for (int i = 0; i < cols; i++)
                        {
                            double d = adapter.Scale * dw[(((e * rows) + o) * cols) + i];
                            int atA = (((e * Rank) + k) * cols) + i, atB = (((e * rows) + o) * Rank) + k;
                            da[atA] += d * b[atB];
                            db[atB] += d * a[atA];
                        }

            Assert.That(V26.NormError(V26.Gradient(model, adapter.NameOfB), db), Is.LessThan(1e-4),
                adapter.NameOfB);
            if (ofA)
                Assert.That(V26.NormError(V26.Gradient(model, adapter.NameOfA), da),
                    Is.LessThan(1e-4), adapter.NameOfA);
        }
    }

    // By PEFT's names and its formula: A of expert e are rows e r + k, B columns k experts + e.
    private void AssertMerged(string before, string after, Adapter[] adapters)
    {
        using var file = SafetensorsFile.Open(Path.Combine(_folder, AdapterFile.WeightsName));
        using Checkpoint old = Checkpoint.Open(before), merged = Checkpoint.Open(after);
        foreach (Adapter adapter in adapters)
        {
            string module = "base_model.model." + adapter.Module[..adapter.Module.LastIndexOf('.')]
                + (adapter.Module.EndsWith("gate_up_proj") ? ".base_layer" : "");
            StoredTensor a = file.Get(module + ".lora_A.weight"), b = file.Get(module + ".lora_B.weight");
            Assert.That(a.SizesText, Is.EqualTo($"[{adapter.Experts * Rank}, {adapter.Inputs}]"));
            Assert.That(b.SizesText, Is.EqualTo($"[{adapter.Outputs}, {adapter.Experts * Rank}]"));
            float[] av = a.ToFloats(), bv = b.ToFloats(), w = old.Get(adapter.Module).ToFloats();
            var (rows, cols) = (adapter.Outputs, adapter.Inputs);
            double[] wanted = Doubles(w);
            for (int at = 0; at < wanted.Length; at++)
            {
                int e = at / (rows * cols), o = at / cols % rows, i = at % cols;
                for (int k = 0; k < Rank; k++)
                    wanted[at] += adapter.Scale * av[(((e * Rank) + k) * cols) + i]
                        * bv[(o * adapter.Experts * Rank) + (k * adapter.Experts) + e];
            }

            Assert.That(V26.LargestError(merged.Get(adapter.Module).ToFloats(), wanted),
                Is.LessThan(1e-6), adapter.Module);
        }
    }

    private static double[] Doubles(float[] values) => [.. values.Select(v => (double)v)];
}
