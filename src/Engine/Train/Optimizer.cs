using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// AdamW with decoupled decay over the flat ranges, gradients scaled down to a global norm first
/// (Loshchilov and Hutter 2019; torch.optim.AdamW's order of operations).
/// </summary>
public sealed class Optimizer
{
    private readonly Device _device;
    private readonly Trainables _trainables;
    private readonly TrainArguments _arguments;
    private readonly Tensor _norm;

    public Optimizer(Device device, Trainables trainables, TrainArguments arguments)
    {
        (_device, _trainables, _arguments) = (device, trainables, arguments);
        _norm = device.Allocate(Kernels.Updates.GradientNorm.Spec, "gradient norm");
    }

    /// <summary>Updates made; the power of the bias corrections.</summary>
    public int Updates { get; set; }

    /// <summary>Global L2 norm of the gradients, before clipping; not finite if any gradient is not.</summary>
    public double GradientNorm()
    {
        _device.GradientNorm([_trainables.Gradients], _arguments.MaxGradNorm, _norm, Tensor.None);
        Span<double> values = stackalloc double[3];
        _device.Read(_norm, values);
        return values[2] > 0 ? double.NaN : values[0];
    }

    /// <summary>Changes all trained values by one step, with the gradients measured last.</summary>
    public void Step(double learningRate)
    {
        Updates++;
        foreach (Trainables.Run run in _trainables.Runs)
        {
            var step = new AdamW(
                learningRate, _arguments.AdamBeta1, _arguments.AdamBeta2, _arguments.AdamEpsilon,
                run.Decays ? _arguments.WeightDecay : 0, Updates,
                (ulong)_arguments.Seed);
            _device.Update(
                step,
                new AdamWRange(
                    _trainables.Values(run), _trainables.MastersOf(run),
                    Trainables.Stretch(_trainables.Gradients, run),
                    Trainables.Stretch(_trainables.FirstMoments, run),
                    Trainables.Stretch(_trainables.SecondMoments, run), run.Begin),
                _norm);
        }
    }
}
