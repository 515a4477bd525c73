namespace MiniCpmNative.Engine.Metrics;

/// <summary>
/// Relaxed accuracy of ChartQA (Masry et al. 2022) as pix2struct's evaluation has it: a number may
/// be off by 5 % of the reference, anything else must be the same text in lower case. "5%" is 0.05;
/// a reference of 0 is compared as text.
/// </summary>
public static class RelaxedAccuracy
{
    private const double Tolerance = 0.05;

    public static double Score(string answer, IReadOnlyList<string> references) =>
        references.Any(reference => IsRight(answer, reference)) ? 1 : 0;

    private static bool IsRight(string answer, string reference)
    {
        if (Number(answer) is { } got && Number(reference) is { } wanted && wanted != 0)
            return Math.Abs(got - wanted) / Math.Abs(wanted) <= Tolerance;
        return PythonText.Lower(answer) == PythonText.Lower(reference);
    }

    private static double? Number(string text) => text.EndsWith('%')
        ? PythonText.Float(text.TrimEnd('%')) / 100 : PythonText.Float(text);
}
