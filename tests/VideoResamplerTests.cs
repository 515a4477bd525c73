using System.IO.Compression;
using System.Text.Json;
using MiniCpmNative.Autograd;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Frames of MiniCPM-V-4_5 that become features together, and the positions of their times, against
/// its own resampler in float64 (tests/reference/v45/temporal).
/// </summary>
[TestFixture]
public sealed class VideoResamplerTests
{
    private static readonly JsonElement s_json = ReferenceModel.Of("v45").Json("temporal.json");
    private string _path = "";
    private SafetensorsFile _file = null!;

    [OneTimeSetUp]
    public void Unpack()
    {
        _path = Path.Combine(Directory.CreateTempSubdirectory("cpmx-test-").FullName, "temporal");
        using (var packed = new GZipStream(
            File.OpenRead(Path.Combine(ReferenceFile.Root, "v45", "temporal.safetensors.gz")),
            CompressionMode.Decompress))
        using (FileStream to = File.Create(_path + ".safetensors")) packed.CopyTo(to);
        _file = SafetensorsFile.Open(_path + ".safetensors");
    }

    [OneTimeTearDown]
    public void Delete()
    {
        _file.Dispose();
        Directory.Delete(Path.GetDirectoryName(_path)!, recursive: true);
    }

    // far: ids beyond the official table; inside: -1 in a group; mixed: pictures between groups.
    [Test]
    public void GroupsHaveTheFeaturesAndGradientsOfTheReference(
        [Values("stills", "group3", "group6", "inside", "far", "mixed")] string name,
        [Values(DType.F32, DType.F64)] DType type)
    {
        using var device = new CpuDevice(2, 1L << 28, type);
        Compare(device, name);
    }

    [Test, NonParallelizable]
    public void AGpuHasThemToo()
    {
        using var gpu = new CudaSource();
        using OpenDevice device =
            gpu.Source.Open(new TrainArguments { Device = DeviceChoice.Cuda });
        Compare(device.Device, "mixed");
    }

    private void Compare(Device device, string name)
    {
        DType type = device.Activations;
        int[] sizes = Ints($"{name}.tgt_sizes"), ids = Ints($"{name}.temporal_ids");
        int[] counts = Ints($"{name}.frames_per_group");
        var batch = new Batch();
        batch.Clear();
        for (int group = 0, frame = 0; group < counts.Length; group++)
            for (int i = 0; i < counts[group]; i++, frame++)
            {
                var grid = new Engine.Data.Images.PatchGrid(sizes[2 * frame],
                    sizes[(2 * frame) + 1]);
                batch.Grids.Add(grid.Rows);
                batch.Grids.Add(grid.Columns);
                batch.PictureStarts.Add(batch.PictureStarts[^1] + grid.Patches);
                batch.Times.Add(new ViewTime(ids[frame], Joined: i > 0));
            }

        var graph = new Graph(device);
        DoubleModel.TrainedTensors? tensors = null;
        var scope = new ModuleScope(new ParameterTable.Builder(),
            tensors = new DoubleModel.TrainedTensors(graph, name => _file.Get(name)));
        var resampler = new Resampler(new ResamplerSpec(128, 96, 16), scope.In("weights"));
        var upload = new BatchUpload(device);
        upload.Run(batch, [resampler]);
        Tensor x = Parameter(_file.Get($"{name}.x"), 96, out Tensor dx);
        Tensor starts = device.Allocate(
            new Spec(DType.I32, new Shape(batch.PictureStarts.Count)), "starts");
        device.Write<int>(starts, batch.PictureStarts.Span);
        Tensor y = resampler.Forward(graph, x, starts, null);
        Assert.That(y.Shape, Is.EqualTo(new Shape(counts.Length * 16, 128)));
        Near(device.ReadFloats(y), Floats($"{name}.y"), "y");

        // The sum of y * dy, as a product of one row and one column.
        StoredTensor dy = _file.Get($"{name}.dy");
        Tensor column = device.Allocate(new Spec(type, new Shape((int)dy.Count, 1)), "dy");
        device.WriteFloats(column, dy.ToFloats());
        graph.Backward(graph.Run(
            new Linear(Transposed: true), y.Reshape(1, (int)y.Shape.Count), column), 1);
        graph.ZeroUnreachedGradients();
        Near(device.ReadFloats(dx), Floats($"{name}.dx"), "dx");
        foreach (JsonProperty expected in s_json.GetProperty("cases").GetProperty(name)
            .GetProperty("gradients").EnumerateObject())
        {
            var print = Fingerprint.Read(expected.Value);
            float[] found = device.ReadFloats(tensors.Gradients["weights." + expected.Name]);
            Assert.That(Fingerprint.Of(found, print.Shape).NormError(print), Is.LessThan(1e-5),
                expected.Name);
        }

        graph.EndStep();

        Tensor Parameter(StoredTensor stored, int cols, out Tensor gradient)
        {
            var spec = new Spec(type, new Shape((int)(stored.Count / cols), cols));
            Tensor value = device.Allocate(spec, "x");
            device.WriteFloats(value, stored.ToFloats());
            gradient = device.Allocate(spec, "dx");
            return graph.Parameter(value, gradient);
        }
    }

    [Test]
    public void PositionsOfTimesAreThoseOfTheOfficialTable()
    {
        int[] ids = Ints("table128.ids");
        float[] expected = Floats("table128.rows");
        var row = new float[128];
        for (int i = 0; i < ids.Length; i++)
        {
            SinCos1D.Write(ids[i], row);
            for (int k = 0; k < row.Length; k++)
                Assert.That(row[k], Is.EqualTo(expected[(i * 128) + k]).Within(1e-6), $"{ids[i]}");
        }

        Assert.That(ids.Max(), Is.GreaterThan(72000));
    }

    private static void Near(float[] found, float[] expected, string what)
    {
        Assert.That(found, Has.Length.EqualTo(expected.Length));
        double most = expected.Max(v => Math.Abs((double)v));
        for (int i = 0; i < found.Length; i++)
            Assert.That(Math.Abs((double)found[i] - expected[i]), Is.LessThan(1e-5 * most),
                $"{what} {i}");
    }

    private float[] Floats(string name) => _file.Get(name).ToFloats();

    private int[] Ints(string name) =>
        [.. ReferenceFile.OpenAt(_path).Doubles(name).Select(v => (int)v)];
}
