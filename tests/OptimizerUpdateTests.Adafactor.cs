using System.Text.Json;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Updates;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>Adafactor against transformers' class and against its formula.</summary>
public sealed partial class OptimizerUpdateTests
{
    private static IEnumerable<TestCaseData> Factored => Of("optim/adafactor");

    /// <summary>
    /// What is kept, and where there is no first moment the values; with a rounded copy as well.
    /// </summary>
    [TestCaseSource(nameof(Factored))]
    public void EachStepOfAdafactorEqualsTransformers(object value, bool cuda)
    {
        var c = (ReferenceCase)value;
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        var shape = new Shape([.. c.Params.GetProperty("shape").EnumerateArray()
            .Select(e => e.GetInt32())]);
        bool hasFirst = c.Params.GetProperty("beta1").ValueKind != JsonValueKind.Null;
        var form = new OptimizerForm(UpdateRule.Adafactor);
        Tensor[] states = [.. form.StatesOf(DType.F32, shape)
            .Select(s => device.Allocate(s.Spec, s.Name))];
        string[] names = shape.Rank > 1 ? ["row_after", "col_after"] : ["v_after"];
        Tensor New(DType type) => device.Allocate(new(type, shape), "t");
        Tensor p = New(DType.F32), g = New(DType.F32), copy = New(DType.BF16);
        double[] rates = c.Doubles("lr");
        for (int step = 0; step < rates.Length; step++)
        {
            device.WriteFloats(p, step == 0 ? Floats(c, "p") : Part("p_after", step - 1, shape));
            device.WriteFloats(g, Part("g", step, shape));
            for (int i = 0; i < states.Length; i++)
                device.WriteFloats(states[i], step == 0 ? new float[states[i].Shape.Count]
                    : Part(names[i], step - 1, states[i].Shape));
            var update = new UpdateStep(rates[step], 0, 0, 0,
                c.Params.GetProperty("weight_decay").GetDouble(), step + 1, 0, form.Rule);
            device.Update(update, OptimizerForm.Range(copy, p, g, 0, states), Tensor.None);
            for (int i = 0; i < states.Length; i++)
                Close(device.ReadFloats(states[i]), Part(names[i], step, states[i].Shape), names[i]);
            float[] got = device.ReadFloats(p);
            if (!hasFirst) Close(got, Part("p_after", step, shape), "p");
            Assert.That(device.ReadFloats(copy), Is.EqualTo(
                Array.ConvertAll(got, x => FloatBits.FromBF16(FloatBits.ToBF16(x)))));
        }

        float[] Part(string key, int step, Shape of) =>
            Floats(c, key)[(int)(step * of.Count)..(int)((step + 1) * of.Count)];

        void Close(float[] got, float[] expected, string what)
        {
            double largest = expected.Max(Math.Abs);
            for (int i = 0; i < got.Length; i++)
                Assert.That(got[i], Is.EqualTo(expected[i]).Within(1e-6 * largest), $"{what}[{i}]");
        }
    }

    /// <summary>Without a gradient a row and a column, and an element of a vector, stay as they
    /// are, in the first step too.</summary>
    [Test]
    public void WhatHasNoGradientStays([Values] bool cuda, [Values] bool ofVector)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        Tensor New(params int[] shape) => device.Allocate(new(DType.F32, new(shape)), "t");
        int[] shape = ofVector ? [12] : [3, 4];
        Tensor p = New(shape), g = New(shape), m = New(ofVector ? 12 : 3);
        Tensor v = ofVector ? Tensor.None : New(4);
        float[] gradient = [1, 2, 0, 3, 0, 0, 0, 0, 2, 1, 0, 1];
        foreach (Tensor zero in (Tensor[])[p, m, v])
            if (zero.Exists) device.WriteFloats(zero, new float[zero.Shape.Count]);
        device.WriteFloats(g, gradient);
        device.Update(new UpdateStep(0.1, 0, 0, 0, 0, 1, 0, UpdateRule.Adafactor),
            new(p, Tensor.None, g, m, v), Tensor.None);
        float[] got = device.ReadFloats(p);
        for (int i = 0; i < got.Length; i++)
            Assert.That(got[i], gradient[i] == 0 ? Is.Zero : Is.Negative, $"[{i}]");
    }

    /// <summary>Many rows and columns, and several matrices, against the formula in
    /// double.</summary>
    [TestCase(1, 517, 300, false)]
    [TestCase(1, 517, 300, true)]
    [TestCase(3, 5, 7, true)]
    [TestCase(3, 5, 7, false)]
    public void AdafactorOfAnyMatrix(int batch, int rows, int cols, bool cuda)
    {
        using var cpu = new CpuDevice(2, StepBytes);
        Device device = cuda ? Cuda(DType.F32) : cpu;
        var shape = new Shape(batch, rows, cols);
        int count = batch * rows * cols;
        float[] p = Narrow(Fill.Normal(1, count)), g = Narrow(Fill.Normal(2, count));
        float[] row = Array.ConvertAll(Narrow(Fill.Normal(3, batch * rows)), Math.Abs);
        // So small that the changes are larger than allowed.
        float[] col = Array.ConvertAll(
            Narrow(Fill.Normal(4, batch * cols)), x => 0.1f + (0.1f * Math.Abs(x)));
        double length = Math.Sqrt(g.Sum(x => (double)x * x));
        Tensor New(Shape of, float[] values)
        {
            Tensor tensor = device.Allocate(new(DType.F32, of), "t");
            device.WriteFloats(tensor, values);
            return tensor;
        }

        Tensor weights = New(shape, p), gradient = New(shape, g);
        Tensor m = New(new(batch, rows), row), v = New(new(batch, cols), col);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        device.GradientNorm([gradient], length / 2, norm, Tensor.None);
        var step = new UpdateStep(0.1, 0, 0, 0, 0.1, 7, 0, UpdateRule.Adafactor);
        device.Update(step, new(weights, Tensor.None, gradient, m, v), norm);
        double factor = length / 2 / (length + 1e-6);
        double keep = 1 - Math.Pow(7, -0.8);
        var (u, newRow, newCol) = (new double[count], new double[row.Length], new double[col.Length]);
        for (int b = 0; b < batch; b++)
        {
            double At(int r, int c) => g[(((b * rows) + r) * cols) + c] * factor;
            for (int r = 0; r < rows; r++)
                newRow[(b * rows) + r] = (keep * row[(b * rows) + r]) + ((1 - keep)
                    * Enumerable.Range(0, cols).Average(c => (At(r, c) * At(r, c)) + 1e-30));
            for (int c = 0; c < cols; c++)
                newCol[(b * cols) + c] = (keep * col[(b * cols) + c]) + ((1 - keep)
                    * Enumerable.Range(0, rows).Average(r => (At(r, c) * At(r, c)) + 1e-30));
            double mean = newRow[(b * rows)..((b + 1) * rows)].Average();
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < cols; c++)
                    u[(((b * rows) + r) * cols) + c] = At(r, c) / Math.Sqrt(
                        newRow[(b * rows) + r] / mean * newCol[(b * cols) + c]);
        }

        double size = Math.Sqrt(u.Average(x => x * x));
        Assert.That(size, Is.GreaterThan(1.1), "or nothing is held back");
        float[] got = device.ReadFloats(weights);
        for (int i = 0; i < count; i++)
            Assert.That(got[i], Is.EqualTo((p[i] * 0.99) - (0.1 * u[i] / size))
                .Within(2e-6 * Math.Max(1, Math.Abs(u[i] / size))));
        AllClose(device.ReadFloats(m), newRow);
        AllClose(device.ReadFloats(v), newCol);

        // Nothing changes where a gradient is not finite.
        g[count / 2] = float.NaN;
        device.WriteFloats(gradient, g);
        device.GradientNorm([gradient], 0.5, norm, Tensor.None);
        device.Update(step, new(weights, Tensor.None, gradient, m, v), norm);
        Assert.That(device.ReadFloats(weights), Is.EqualTo(got));
        AllClose(device.ReadFloats(m), newRow);
        AllClose(device.ReadFloats(v), newCol);

        static void AllClose(float[] got, double[] expected)
        {
            for (int i = 0; i < got.Length; i++)
                Assert.That(got[i], Is.EqualTo(expected[i]).Within(2e-6 * expected[i]), $"[{i}]");
        }
    }
}
