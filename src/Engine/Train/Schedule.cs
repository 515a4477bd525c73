using MiniCpmNative.Engine.Config;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// The learning rate as a pure function of the step: no state to save. The formulas are those of
/// transformers' get_scheduler and of DeepSpeed's WarmupLR, evaluated in the same order.
/// </summary>
/// <param name="Type">The shape of the curve.</param>
/// <param name="Peak">Learning rate after warm-up.</param>
/// <param name="Warmup">Steps of warm-up.</param>
/// <param name="Total">Steps of the whole run.</param>
/// <param name="Options">Parameters of single shapes.</param>
public sealed record Schedule(
    LrSchedule Type, double Peak, int Warmup, int Total, ScheduleOptions Options)
{
    public static Schedule Of(TrainArguments arguments, int maxSteps) => new(
        arguments.LrSchedulerType, arguments.LearningRate, arguments.WarmupOf(maxSteps), maxSteps,
        arguments.LrSchedulerKwargs);

    /// <summary>
    /// The rate that the optimizer step numbered from 0 uses; defined past the end too.
    /// </summary>
    public double At(int step) => Type switch
    {
        LrSchedule.WarmupLr => WarmupLr(step),
        LrSchedule.Constant => Peak,
        LrSchedule.InverseSqrt => Peak * InverseSqrt(step),
        LrSchedule.Polynomial => Polynomial(step),
        _ => Peak * Factor(step),
    };

    /// <summary>
    /// A line on a run that learns nothing, or whose warm-up does not end before it does; else
    /// null.
    /// </summary>
    public string? Notice => (float)Peak == 0
        ? FormattableString.Invariant(
            $"learning_rate is {Peak}, which is 0 in 32 bits: nothing is learned")
        : Total > 0 && Warmup >= Total && At(Total - 1) < Peak
        ? FormattableString.Invariant(
            $"the warm-up has {Warmup:N0} steps, the run {Total:N0}: learning_rate {Peak} is never ")
            + FormattableString.Invariant($"reached, the largest is {At(Total - 1):g4}")
        : null;

    private double Factor(int step)
    {
        if (step < Warmup) return (double)step / Math.Max(1, Warmup);
        if (Type == LrSchedule.ConstantWithWarmup) return 1;
        if (Type == LrSchedule.Linear)
            return Math.Max(0, (double)(Total - step) / Math.Max(1, Total - Warmup));
        double progress = (double)(step - Warmup) / Math.Max(1, Total - Warmup);
        if (Type is LrSchedule.Cosine or LrSchedule.CosineWithMinLr)
        {
            double wave = Wave(Math.PI * (Options.NumCycles ?? 0.5) * 2 * progress);
            if (Type == LrSchedule.Cosine) return wave;
            double lowest = Options.MinLrRate ?? Options.MinLr!.Value / Peak;
            return (wave * (1 - lowest)) + lowest;
        }

        return progress >= 1 ? 0 : Wave(Math.PI * ((Options.NumCycles ?? 1) * progress % 1));
    }

    private static double Wave(double angle) => Math.Max(0, 0.5 * (1 + Math.Cos(angle)));

    private double Polynomial(int step)
    {
        if (step < Warmup) return Peak * ((double)step / Math.Max(1, Warmup));
        if (step > Total) return Peak * (Options.LrEnd / Peak);
        double remaining = 1 - ((double)(step - Warmup) / (Total - Warmup));
        if (double.IsNaN(remaining)) remaining = 0;
        double rate = ((Peak - Options.LrEnd) * Math.Pow(remaining, Options.Power)) + Options.LrEnd;
        return Peak * (rate / Peak);
    }

    private double InverseSqrt(int step)
    {
        if (step < Warmup) return (double)step / Math.Max(1, Warmup);
        int timescale = Options.Timescale ?? (Warmup > 0 ? Warmup : 10_000);
        return 1 / Math.Sqrt((double)(step + timescale - Warmup) / timescale);
    }

    // DeepSpeed counts one step behind: its first two steps use the smallest rate.
    private double WarmupLr(int step)
    {
        int warmup = Math.Max(2, Warmup);
        int iteration = step - 1;
        if (iteration < 0) return Options.WarmupMinLr;
        if (iteration >= warmup) return Peak;
        double gamma = Options.WarmupType == WarmupCurve.Log
            ? Math.Log(iteration + 1) / Math.Log(warmup)
            : (double)iteration / warmup;
        return Options.WarmupMinLr + ((Peak - Options.WarmupMinLr) * gamma);
    }
}
