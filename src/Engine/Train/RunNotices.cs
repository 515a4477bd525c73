using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;

namespace MiniCpmNative.Engine.Train;

/// <summary>Settings that are possible, but hardly what somebody meant: a line on each.</summary>
internal static class RunNotices
{
    public static IEnumerable<string> Of(
        TrainArguments arguments, Schedule schedule, StepPlan plan, ModelSpec spec)
    {
        if (schedule.Notice is { } rates) yield return rates;
        double decayed = arguments.LearningRate * arguments.WeightDecay;
        if (decayed >= 1)
            yield return FormattableString.Invariant($"learning_rate {arguments.LearningRate} times ")
                + FormattableString.Invariant($"weight_decay {arguments.WeightDecay} is {decayed:g4}: ")
                + "from 1 on each step takes away all that weights are; usual decays are below 0.2";
        if (arguments.SaveStrategy == When.Steps && plan.SavingSteps > plan.MaxSteps)
            yield return $"save_steps {Messages.Number(plan.SavingSteps)} is above the run's "
                + $"{Messages.Number(plan.MaxSteps)} steps: nothing is saved before its end";
        int positions = spec.Decoder.MaxPositions;
        if (arguments.ModelMaxLength > positions)
            yield return $"model_max_length {Messages.Number(arguments.ModelMaxLength)} is above the "
                + $"model's max_position_embeddings {Messages.Number(positions)}: longer rows are at "
                + "places that it never saw";
    }
}
