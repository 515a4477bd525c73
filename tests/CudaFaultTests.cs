using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// An index outside its table reads no foreign memory: the host throws, naming it, when it next reads,
/// and the device goes on. The emulator sees to the first, since it watches every access.
/// </summary>
[TestFixture]
public sealed class CudaFaultTests
{
    private CudaUnderTest _cuda = null!;

    /// <summary>One number of one input of a sound problem is replaced.</summary>
    internal sealed record FaultCase(
        Op Op, Value[] Inputs, int Input, int Index, int Wrong, string Message)
    {
        public override string ToString() => $"{Op.Name} {Inputs[Input].Name}[{Index}] = {Wrong}";
    }

    private static FaultCase[] Cases { get; } =
    [
        Rope(8, index: 2, 9, "rope: positions[2] is 9, expected 0 to 8"),
        Rope(8, index: 0, -1, "rope: positions[0] is -1, expected 0 to 8"),
        Rope(32, index: 4, int.MaxValue, "rope: positions[4] is 2147483647, expected 0 to 8"),
        Rope(32, index: 4, int.MinValue, "rope: positions[4] is -2147483648, expected 0 to 8"),
    ];

    [OneTimeSetUp]
    public void Make() => _cuda = new();

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void AWrongIndexIsNamedAndTheDeviceGoesOn(object value)
    {
        var c = (FaultCase)value;
        foreach (DType type in (DType[])[DType.F32, DType.BF16])
        {
            using var run = new OpRun(_cuda.Device(type), c.Op, c.Inputs);
            double[] dy = Fill.Normal(77, run.Count);
            run.Want(_ => true);
            (double[] Output, double[]?[] Gradients) sound = Results();
            double right = c.Inputs[c.Input].Data[c.Index];
            run.Set(c.Input, c.Index, c.Wrong);
            run.Forward();
            Assert.That(() => run.Output, Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo(c.Message), $"forward {type}");
            run.Backward(dy);
            Assert.That(() => run.Output, Throws.TypeOf<ShapeException>()
                .With.Message.EqualTo(c.Message), $"backward {type}");
            run.Set(c.Input, c.Index, right);
            Assert.That(Results(), Is.EqualTo(sound), $"afterwards {type}");
            Assert.That(_cuda.Emulator?.Fault, Is.Null);

            (double[] Output, double[]?[] Gradients) Results()
            {
                run.Forward();
                run.Backward(dy);
                return (run.Output,
                    [.. c.Inputs.Select((_, i) => run.HasGradient(i) ? run.Gradient(i) : null)]);
            }
        }
    }

    private static FaultCase Rope(int headDim, int index, int wrong, string message) => new(
        new Rope(headDim),
        [
            Value.Float("x", [5, 3 * headDim], Fill.Normal(1, 15 * headDim)),
            Value.Int("positions", 3, 8, 0, 0, 5),
            Value.Float("cos", [9, headDim / 2], Fill.Normal(2, 9 * headDim / 2)),
            Value.Float("sin", [9, headDim / 2], Fill.Normal(3, 9 * headDim / 2)),
        ],
        Input: 1, index, wrong, message);
}
