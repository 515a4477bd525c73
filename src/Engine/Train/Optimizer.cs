using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Steps of an optimizer over the flat ranges, gradients scaled down to a global norm first.
/// </summary>
public sealed class Optimizer
{
    private readonly Device _device;
    private readonly ParameterRanges _trainables;
    private readonly TrainArguments _arguments;

    public Optimizer(Device device, ParameterRanges trainables, TrainArguments arguments)
    {
        (_device, _trainables, _arguments) = (device, trainables, arguments);
        Norm = device.Allocate(GradientNorm.Spec, "gradient norm");
    }

    /// <summary>
    /// Updates that changed anything: the power of the bias corrections. Set by whoever learns from
    /// the device whether the last one did.
    /// </summary>
    public int Updates { get; set; }

    /// <summary>
    /// F64[3], a <see cref="GradientNorm"/>: global L2 norm of the gradients before clipping,
    /// factor, number of elements of gradients and losses that are not finite.
    /// </summary>
    public Tensor Norm { get; }

    /// <summary>Queues the measuring of the gradients; losses may be None.</summary>
    public void Measure(in Tensor losses) =>
        _device.GradientNorm(_trainables.Gradients, _arguments.MaxGradNorm, Norm, losses);

    /// <summary>
    /// Queues a change of all trained values by one step, with the gradients measured last. Where
    /// these are not finite the device changes nothing.
    /// </summary>
    public void Step(double learningRate)
    {
        foreach (ParameterRanges.Run run in _trainables.Runs)
        {
            var step = new UpdateStep(
                learningRate * run.Rate, _arguments.AdamBeta1, _arguments.AdamBeta2,
                _arguments.AdamEpsilon, run.Decay, Updates + 1, (ulong)_arguments.Seed,
                _trainables.Optimizer.Rule);
            var (weights, masters) = ParameterRanges.Updated(run);
            _device.Update(
                step,
                OptimizerForm.Range(
                    weights, masters, ParameterRanges.GradientsOf(run),
                    run.Begin, run.States),
                Norm);
        }

        _device.ForgetVisiting();
    }
}
