using System.Text.Json.Nodes;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Models of any size with weights made up, and central differences that their gradients are held
/// against.
/// </summary>
internal static class MadeModel
{
    /// <summary>Values that keep activations of order one.</summary>
    public static float[] Values(ExpectedTensor parameter, Random random)
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

    /// <summary>Writes the weights of a model into its folder.</summary>
    public static void Write(
        string folder, ModelSpec spec, Func<string, float[]> value, DType type,
        long shardBytes = CheckpointWriter.DefaultShardBytes) => CheckpointWriter.Write(
            folder, [.. spec.Parameters.All.Select(p => Tensor(p, value(p.Name), type))],
            shardBytes);

    /// <summary>The same with made-up values, which follow from the seed.</summary>
    public static void Write(string folder, ModelSpec spec, int seed)
    {
        var random = new Random(seed);
        var values = spec.Parameters.All.ToDictionary(p => p.Name, p => Values(p, random));
        Write(folder, spec, name => values[name], DType.F32);
    }

    /// <summary>The reference model with so many decoder layers, of made-up values.</summary>
    public static string OfLayers(string folder, int layers)
    {
        foreach (string file in Directory.GetFiles(V26.Model, "*.json"))
            File.Copy(file, Path.Combine(folder, Path.GetFileName(file)));
        string path = Path.Combine(folder, "config.json");
        JsonNode config = JsonNode.Parse(File.ReadAllText(path))!;
        config["num_hidden_layers"] = layers;
        File.WriteAllText(path, config.ToJsonString());
        Write(folder, ModelSpec.Read(folder), seed: 3);
        return folder;
    }

    /// <summary>
    /// (L(w + e d) - L(w - e d)) / 2e along the own gradient of the trained tensors whose names
    /// begin so is that gradient's norm. Two steps e, by Richardson's rule: the loss bends.
    /// </summary>
    public static void AssertSlope(TunedModel model, Batch batch, string part)
    {
        Trace.Run(model, batch, gradients: true);
        string[] names = [.. model.ParameterRanges.List.Select(t => t.Name)
            .Where(n => n.StartsWith(part, StringComparison.Ordinal))];
        Assert.That(names, Is.Not.Empty);
        var values = names.ToDictionary(
            n => n, n => model.Device.ReadFloats(model.ParameterRanges.Value(n)));
        var gradients = names.ToDictionary(n => n, n => V26.Gradient(model, n));
        double norm = Math.Sqrt(gradients.Values.Sum(g => g.Sum(v => (double)v * v)));
        double Loss(double along)
        {
            foreach (var (name, g) in gradients)
                model.ParameterRanges.Write(
                    name, [.. values[name].Zip(g, (w, d) => (float)(w + (along * d / norm)))]);
            return Trace.Run(model, batch, gradients: false).Floats["loss"].Values[0];
        }

        double Slope(double step) => (Loss(step) - Loss(-step)) / (2 * step);
        double slope = ((4 * Slope(0.005 / norm)) - Slope(0.01 / norm)) / 3;
        Loss(0);
        TestContext.Out.WriteLine($"{part} norm {norm:G6}, slope {slope:G6}");
        Assert.That(slope, Is.EqualTo(norm).Within(1e-3 * norm), part);
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
