using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Models that no reference has: the files of one with another configuration, and weights.
/// </summary>
internal static class ModelVariant
{
    /// <summary>
    /// A new folder in the parent with a model's small files, its configuration edited.
    /// </summary>
    public static string Files(string model, string parent, Action<JsonNode> edit)
    {
        string folder =
            Directory.CreateDirectory(Path.Combine(parent, Path.GetRandomFileName())).FullName;
        foreach (string file in Directory.GetFiles(model, "*.json"))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
        JsonNode config = JsonNode.Parse(File.ReadAllBytes(Path.Combine(model, "config.json")))!;
        edit(config);
        Write("config.json", config);
        JsonNode processor = JsonNode.Parse(
            File.ReadAllBytes(Path.Combine(model, "preprocessor_config.json")))!;
        processor["image_feature_size"] = config["query_num"]!.DeepClone();
        Write("preprocessor_config.json", processor);
        return folder;

        void Write(string name, JsonNode json)
        {
            string path = Path.Combine(folder, name);
            File.Delete(path);
            File.WriteAllText(path, json.ToJsonString());
        }
    }

    /// <summary>Writes every parameter of the model into the folder.</summary>
    public static void Write(
        string folder, ModelSpec spec, Func<string, float[]> value, DType type,
        long shardBytes = CheckpointWriter.DefaultShardBytes) =>
        CheckpointWriter.Write(folder,
            [.. spec.Parameters.All.Select(p => Tensor(p, value(p.Name), type))], shardBytes);

    /// <summary>Random weights of a size that leaves activations near 1.</summary>
    public static Dictionary<string, float[]> Values(ModelSpec spec, int seed)
    {
        var random = new Random(seed);
        return spec.Parameters.All.ToDictionary(p => p.Name, p => Initial(p, random));
    }

    /// <summary>
    /// (L(w + e d) - L(w - e d)) / 2e along the gradient d of the parameters whose names start so
    /// is that gradient's norm.
    /// </summary>
    public static void AssertSlope(
        TrainingModel model, Batch batch, Dictionary<string, float[]> values, string part)
    {
        Trace.Run(model, batch, gradients: true);
        var gradients = values.Keys.Where(n => n.StartsWith(part, StringComparison.Ordinal))
            .ToDictionary(n => n, n => V26.Gradient(model, n));
        Assert.That(gradients, Is.Not.Empty);
        double norm = Math.Sqrt(gradients.Values.Sum(g => g.Sum(v => (double)v * v)));
        double step = 0.01 / norm;
        double Loss(double along)
        {
            foreach (var (name, g) in gradients)
                model.Trainables.Write(
                    name, [.. values[name].Zip(g, (w, d) => (float)(w + (along * d / norm)))]);
            return Trace.Run(model, batch, gradients: false).Floats["loss"].Values[0];
        }

        double slope = (Loss(step) - Loss(-step)) / (2 * step);
        Loss(0);
        TestContext.Out.WriteLine($"{part} norm {norm:G6}, slope {slope:G6}");
        Assert.That(slope, Is.EqualTo(norm).Within(1e-3 * norm), part);
    }

    private static float[] Initial(ExpectedTensor parameter, Random random)
    {
        var values = new float[parameter.Shape.Count];
        bool vector = parameter.Shape.Rank == 1;
        bool norm = vector && parameter.Name.EndsWith("weight", StringComparison.Ordinal);
        double size = vector ? 0.1 : 1 / Math.Sqrt(parameter.Shape.Cols);
        for (int i = 0; i < values.Length; i++)
        {
            double normal = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()))
                * Math.Cos(2 * Math.PI * random.NextDouble());
            values[i] = (float)((norm ? 1 : 0) + (size * normal));
        }

        return values;
    }

    private static TensorToSave Tensor(ExpectedTensor parameter, float[] values, DType type) =>
        new(parameter.Name, type, parameter.Shape, stream =>
        {
            unsafe
            {
                fixed (float* data = values)
                    TensorToSave.Floats(parameter.Name, type, parameter.Shape, (nint)data)
                        .Write(stream);
            }
        });
}
