using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Bench.Real;

/// <summary>What the card reaches, measured by a large product and a large copy.</summary>
internal sealed record Peaks(double BytesPerSecond, double FlopsPerSecond)
{
    /// <summary>The time in microseconds below which such work cannot be.</summary>
    public double Bound(double bytes, double flops) =>
        1e6 * Math.Max(bytes / BytesPerSecond, flops / FlopsPerSecond);

    /// <summary>
    /// A product of side^3 in bf16, and a copy of eight times as much; in the step's memory.
    /// </summary>
    public static Peaks Measure(CudaDevice device, int side)
    {
        ArenaMark mark = device.Step.Mark();
        Tensor New(int rows, int cols) => device.Step.Push(
            new Spec(device.Activations, new Shape(rows, cols)), "peaks");
        Tensor x = New(side, side), w = New(side, side), y = New(side, side);
        DeviceNoise.Fill(device, x, w);
        var linear = new Linear();
        double product = Seconds(device, 20, () => device.Forward(
            linear, new OpCall([x, w], y, [], recorded: false)));
        Tensor from = New(side * 8, side), to = New(side * 8, side);
        double copy = Seconds(device, 20, () => device.Copy(from, to));
        device.Step.Pop(mark);
        var peaks = new Peaks(2 * from.Spec.Bytes / copy, 2.0 * side * side * side / product);
        Console.WriteLine($"{device.Context.Name}, measured: product of {side}^3 "
            + $"{peaks.FlopsPerSecond / 1e12:f0} TFLOP/s, copy {peaks.BytesPerSecond / 1e12:f2} "
            + "TB/s");
        return peaks;
    }

    /// <summary>Of one of so many in a row.</summary>
    public static double Seconds(CudaDevice device, int times, Action action)
    {
        for (int i = 0; i < 3; i++) action();
        using var start = new CudaEvent(device.Context, timing: true);
        using var end = new CudaEvent(device.Context, timing: true);
        start.Record(device.Stream);
        for (int i = 0; i < times; i++) action();
        end.Record(device.Stream);
        device.Stream.Synchronise();
        return Math.Max(1e-9, end.MillisecondsSince(start) / 1e3 / times);
    }
}
