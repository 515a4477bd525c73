using MiniCpmNative.Engine.Data;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// Adds up what a step queues, as the time that a card needs for it at least: for each kernel,
/// product and copy that of its bytes or that of its FLOPs, whichever is longer, and no less than a
/// launch takes. Kernels other than attention's are taken to be bound by memory.
/// </summary>
/// <param name="bytesPerSecond">What the card copies, read and written bytes together.</param>
/// <param name="flopsPerSecond">What its products reach.</param>
/// <param name="busBytesPerSecond">What copies from page-locked memory reach; what kernels read and
/// write there goes both ways at once.</param>
public sealed class StepWork(
    double bytesPerSecond, double flopsPerSecond, double busBytesPerSecond = double.MaxValue)
    : ILaunchWatch
{
    private const double LaunchSeconds = 3e-6;

    private Func<Attention, int, int, double> _pairs = (_, _, _) => 0;
    private double _attention;
    private string _kernel = "";

    public double Seconds { get; private set; }

    /// <summary>Of these, the bus's.</summary>
    public double BusSeconds { get; private set; }

    public int Launches { get; private set; }

    /// <summary>Takes the lengths of the step's sequences from the batch.</summary>
    public void Begin(Batch batch) => _pairs = PairsOf(batch);

    public void Operation(Op op, in OpCall call, bool backward)
    {
        _kernel = backward ? "attention_backward" : "attention_forward";
        _attention = op is Attention attention
            ? AttentionFlops(attention, backward) * _pairs(
                attention, call.Inputs[0].Shape[0], call.Inputs[1].Shape[0])
            : 0;
    }

    public void Begin(in QueuedWork work)
    {
        double flops = work.Flops;
        if (_attention > 0 && work.Name.StartsWith(_kernel, StringComparison.Ordinal))
            (flops, _attention) = (_attention, 0);
        double bus = work.HostBytes / busBytesPerSecond;
        BusSeconds += bus;
        Seconds += Math.Max(Math.Max(LaunchSeconds, bus), Math.Max(
            (work.Bytes - work.HostBytes) / bytesPerSecond, flops / flopsPerSecond));
        Launches++;
    }

    public void End()
    {
    }

    /// <summary>For each pair of a query and a key: two products forward, five backward.</summary>
    public static double AttentionFlops(Attention attention, bool backward) =>
        (backward ? 10.0 : 4.0) * attention.HeadDim * attention.Heads;

    /// <summary>
    /// Pairs of a query and a key that it sees, of an attention with so many queries and keys in a
    /// step on this batch.
    /// </summary>
    public static Func<Attention, int, int, double> PairsOf(Batch batch) =>
        (attention, queries, keys) =>
        {
            double pairs = 0;
            if (attention.Causal)
            {
                for (int i = 0; i + 1 < batch.SequenceStarts.Count; i++)
                    pairs += CausalPairs(batch.SequenceStarts[i + 1] - batch.SequenceStarts[i]);
                return pairs;
            }

            int pictures = batch.PictureStarts.Count - 1, groups = pictures;
            foreach (ViewTime time in batch.Times.Span) groups -= time.Joined ? 1 : 0;
            for (int i = 0; i < pictures; i++)
            {
                double patches = batch.PictureStarts[i + 1] - batch.PictureStarts[i];
                pairs += patches * (queries == keys ? patches : queries / (double)groups);
            }

            return pairs;
        };

    /// <summary>Of a causal sequence.</summary>
    public static double CausalPairs(double tokens) => tokens * (tokens + 1) / 2;
}
