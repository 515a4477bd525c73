using System.Text.Json;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Adapters beyond plain LoRA on the GPU are those on the CPU.</summary>
[TestFixture]
public sealed class CudaAdapterTests
{
    [TestCase(true)]
    [TestCase(false)]
    public void StepsAreThoseOfTheCpu(bool dora)
    {
        StepResult[] steps = Compare(V26.Lora with
        {
            LoraTargetModules = new TargetModules(["llm.model.layers.0.self_attn.q_proj",
                "llm.model.layers.0.self_attn.v_proj", "llm.model.layers.1.mlp.down_proj",
                "llm.model.layers.1.mlp.up_proj", "llm.model.layers.1.mlp.gate_proj"]),
            UseDora = dora,
            RankPattern = new NumbersByName([("q_proj|gate_proj", 4)]),
            LoraDropout = 0.1,
            LoraplusLrRatio = 4,
        });
        Assert.That(steps[^1].Loss, Is.LessThan(steps[0].Loss - 0.01), "it learns");
    }

    // Embedding and head, the latter with dropout; single tokens of both, and biases of B.
    [TestCase(false)]
    [TestCase(true)]
    public void StepsOfEmbeddingAndHeadAreThoseOfTheCpu(bool tokens) => Compare(V26.Lora with
    {
        LoraTargetModules = new TargetModules(tokens
            ? ["llm.model.layers.0.self_attn.q_proj", "llm.model.layers.1.mlp.down_proj"]
            : ["embed_tokens", "lm_head", "llm.model.layers.0.self_attn.q_proj"]),
        LoraR = 3,
        LoraDropout = 0.1,
        LoraBias = tokens ? LoraBias.True : LoraBias.None,
        TrainableTokenIndices = tokens ? TokenIndices.Of(JsonElement.Parse(
            """{"embed_tokens": [74, 502, 504], "lm_head": [502, 9]}"""u8)) : null,
    });

    private static StepResult[] Compare(TrainArguments arguments)
    {
        Batch text = V26.Batch(arguments, "text0", "text1");
        StepResult[] cpu = Steps(null), gpu;
        using (var emulated = new CudaSource()) gpu = Steps(emulated.Source);
        foreach (var (wanted, got) in cpu.Zip(gpu))
        {
            Assert.That(got.Loss, Is.EqualTo(wanted.Loss).Within(1e-4 * wanted.Loss));
            Assert.That(got.GradientNorm,
                Is.EqualTo(wanted.GradientNorm).Within(1e-4 * wanted.GradientNorm));
        }

        return cpu;

        StepResult[] Steps(DeviceSource? devices)
        {
            using var model = TunedModel.Open(arguments with
            {
                Device = devices is null ? DeviceChoice.Cpu : DeviceChoice.Cuda,
                // What is computed again in backward is the same.
                Recompute = devices is null ? Recompute.Nothing : Recompute.Block,
            }, devices);
            var trainer = new Trainer(arguments, model);
            return [.. Enumerable.Range(0, 3).Select(i => trainer.Step(i, [text], 3e-3))];
        }
    }
}
