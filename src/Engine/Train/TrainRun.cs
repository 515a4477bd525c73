using System.Diagnostics.CodeAnalysis;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Data;
using MiniCpmNative.Engine.Generate;
using MiniCpmNative.Engine.Metrics;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Train;

/// <summary>
/// `cpmx train`: one run from its configuration to the saved result. Everything the user gave is
/// read and checked before the first step; the steps themselves are in TrainRun.Steps.cs.
/// </summary>
public sealed partial class TrainRun
{
    private readonly TrainArguments _arguments;
    private readonly ITrainLog _log;
    private readonly StopRequest _stop;
    private readonly RunFolder _folder;
    private readonly TunedModel _model;
    private readonly Trainer _trainer;
    private readonly DataRows _rows;
    private readonly DataRows? _evaluationRows;
    private readonly IReadOnlyList<Metric> _metrics;
    private readonly RowAnswerer? _answerer;
    private readonly int _workers;
    private readonly PlannedModel _planned;
    private readonly OpenDevice _device;
    private MemoryPlan? _memory;
    private StepPlan _plan;
    private Schedule _schedule;
    private Sampler _sampler;

    private TrainRun(
        TrainArguments arguments, ITrainLog log, StopRequest stop, RunFolder folder,
        BaseModel source, OpenDevice device)
    {
        (_arguments, _log, _stop, _folder) = (arguments, log, stop, folder);
        _metrics = Metric.Of(arguments.Metrics);
        RowFormat format = source.Spec.Rows();
        _rows = DataRows.Open(arguments.TrainingData, arguments, format, log.Message);
        if (arguments.EvaluationData is { } evaluation && arguments.Evaluates)
            _evaluationRows = DataRows.Open(evaluation, arguments, format, log.Message, _rows);
        Plan();
        CheckPlaces(source);
        (_planned, _device) = (source.Planned, device);
        PlanMemory();
        TrainArguments planned = _memory?.Of(arguments) ?? arguments with
        {
            StreamWeights = StreamedWeights.False,
            OffloadOptimizer = false,
            OffloadParam = false,
        };
        _model = TunedModel.Load(source, device, planned, resumeFrom: folder.ResumeFrom,
            say: log.Message);
        if (device.Pageable is { } line) log.Message(line);
        _memory?.Apply(_model);
        _trainer = new Trainer(planned, _model) { Together = _memory?.Together ?? 1 };
        if (arguments.EvalGenerate > 0 && _evaluationRows is not null)
            _answerer = new RowAnswerer(_model.Loaded, _evaluationRows, GenerationSettings.Of(
                arguments, source.Spec, format.Prompts.StopIds, chats: false));
        _workers = arguments.DataloaderNumWorkers is > 0 and int workers
            ? workers
            : Math.Max(1, Environment.ProcessorCount / 2);
    }

    [MemberNotNull(nameof(_plan), nameof(_schedule), nameof(_sampler))]
    private void Plan()
    {
        _plan = new StepPlan(_arguments, _rows.Count);
        _schedule = Schedule.Of(_arguments, _plan.MaxSteps);
        _sampler = new Sampler(_arguments, _rows.Count);
    }

    // Only a GPU's memory is taken in advance.
    private void PlanMemory()
    {
        if (_device.Card is not { } card) return;
        // Where weights lie is settled once they are loaded.
        bool isFirst = _memory is null;
        TrainArguments arguments = _memory?.Of(_arguments) ?? _arguments;
        _memory = MemoryPlan.Make(arguments, _planned, card, _rows, _evaluationRows, _plan,
            _device.Allowed(_arguments.MemoryLimit));
        if (isFirst) _memory.MustFitBeside(_device.MachineBytes, arguments);
    }

    /// <summary>Trains as configured, from the beginning or a checkpoint.</summary>
    /// <exception cref="InputException">What the user gave cannot be used.</exception>
    /// <exception cref="RunException">The run failed.</exception>
    public static void Run(TrainArguments arguments, ITrainLog log, StopRequest stop) =>
        Run(arguments, log, stop, DeviceSource.Default);

    /// <summary>As above, with devices of one's own.</summary>
    public static void Run(
        TrainArguments arguments, ITrainLog log, StopRequest stop, DeviceSource devices)
    {
        // The cheap checks first: nothing large is read in vain, and nothing removed.
        using RunFolder folder = RunFolder.Open(arguments);
        using BaseModel source = BaseModel.Open(arguments, log.Message);
        RunPlaces.MustHoldCheckpoints(
            arguments, source.SavedBytes, checkpoints: 1, RunPlaces.Free(arguments.OutputDir));
        using OpenDevice device = devices.Open(arguments, log.Message);
        source.MustFitOn(device, arguments, isOpen: true);
        if (source.Widened(device) is { } line) log.Message(line);
        new TrainRun(arguments, log, stop, folder, source, device).Run();
    }

    // What is known only once the rows are.
    private void CheckPlaces(BaseModel source)
    {
        _folder.MustKeep(_rows.PictureFiles);
        if (_evaluationRows is not null) _folder.MustKeep(_evaluationRows.PictureFiles);
        if (_folder.ResumeFrom is not null) return;
        if (RunPlaces.MustHoldCheckpoints(
            _arguments, source.SavedBytes, _plan.Checkpoints,
            RunPlaces.Free(_arguments.OutputDir)) is { } line)
            _log.Message(line);
    }

    private void Run()
    {
        string? resumeFrom = _folder.ResumeFrom;
        int done = resumeFrom is null ? 0 : Resume(resumeFrom);
        TrainWriter.Save(_arguments);
        _log.Start(new RunReport(
            _arguments, _plan, _model.DeviceName, _model.TotalParameters,
            _model.ParameterRanges.Count,
            resumeFrom, _rows.Counts, _evaluationRows?.Counts));
        if (_memory is not null) _log.Message($"{_memory}");
        foreach (string notice in RunNotices.Of(_arguments, _schedule, _plan, _model.Base.Spec))
            _log.Message(notice);
        WarnOfLargeCheckpoints();
        done = Steps(done);
        if (_memory is not null)
            _log.Message($"GPU memory: at most {RunPlaces.Gib(_model.Device.MemoryInUse)} taken, "
                + $"{RunPlaces.Gib(_memory.Parts.Total)} planned{_device.InUse()}");
        if (_ended == StopReason.None) SaveResult(done);
        _log.End(done, _ended);
    }

    // Puts the best checkpoint's values back, where that is not the last step.
    private int TakeBest(int done)
    {
        if (!_arguments.LoadBestModelAtEnd) return done;
        if (_log.Best is not { } best)
        {
            _log.Message("load_best_model_at_end: no checkpoint was evaluated, the result is the "
                + "last step's");
            return done;
        }

        string folder = RunFolder.Checkpoint(_arguments.OutputDir, best.Step);
        _log.Message(FormattableString.Invariant(
            $"the best checkpoint is {folder}: {_arguments.BestBy} {best.Value:0.0000}"));
        if (best.Step != done) ModelFiles.Load(folder, _model, _arguments);
        return best.Step;
    }

    private void SaveResult(int done)
    {
        int last = done;
        done = TakeBest(done);
        IReadOnlyList<string> written =
            ModelFiles.Save(_arguments.OutputDir, _model, _arguments);
        if (written.Count > 0)
        {
            _folder.Finish(written);
            // A kill may have come before the last of it.
            Rotate();
            return;
        }

        string checkpoint = RunFolder.Checkpoint(_arguments.OutputDir, done);
        if (done == last && _saved != done) Save(done);
        throw new RunException(
            $"{_arguments.ModelNameOrPath}: its weights were changed during the run, so those that "
            + "were not "
            + $"trained cannot be saved; what was trained is in {checkpoint}: put the weights "
            + "back, then --resume_from_checkpoint true writes the whole model");
    }

    private void Save(int step)
    {
        string folder = RunFolder.Checkpoint(_arguments.OutputDir, step);
        string unfinished = folder + RunFolder.Unfinished;
        try
        {
            if (Directory.Exists(unfinished)) Disk.Remove(unfinished);
            Disk.MakeFolder(unfinished);
            bool whole = ModelFiles.SaveCheckpoint(unfinished, _model, _arguments);
            if (!whole)
                _log.Message(
                    $"{_arguments.ModelNameOrPath}: its weights were changed during the run: "
                    + $"{folder} has "
                    + "what was trained alone; put them back before its end");
            _log.SaveState(unfinished, step);
            if (!whole || !_arguments.SaveOnlyModel) State(step).Save(unfinished, _model);
            _folder.Place(unfinished, folder);
        }
        catch (Exception failure)
        {
            RunFolder.RemoveUnfinished(unfinished);
            if (failure is IOException or UnauthorizedAccessException)
                throw new RunException(
                    $"{folder}: cannot write: {Messages.OneLine(failure.Message)}", failure);
            throw;
        }

        _saved = step;
        _log.Saved(folder);
        Rotate();
    }

    private void Rotate() =>
        RunFolder.Rotate(_arguments.OutputDir, _arguments.SaveTotalLimit, _log.Best?.Step);

    private RunState State(int step) => new(
        step, _trainer.Optimizer.Updates, _trainer.SkippedInARow, _arguments.Seed,
        _arguments.DataSeed ?? _arguments.Seed, _rows.Count, _rows.Digest, _rows.Absent,
        _rows.LeftOut)
    {
        MaxSteps = _plan.MaxSteps,
        Processor = ResumeRules.Processor(_model.Device),
        Model = _model.Base.Identity,
        Draws = Philox.Version,
        Settings = ResumeRules.Settings(_arguments),
    };

    private int Resume(string folder)
    {
        RunState.RequireOurs(folder);
        RunState state = RunState.Read(folder);
        ModelFiles.Load(folder, _model, _arguments);
        RunState.LoadOptimizer(folder, _model);
        var rules = new ResumeRules(folder, state, _arguments, _log.Message);
        bool others = rules.TakesOtherRows(_rows.Digest);
        // The same places for the same rows, whichever of them have become bad since.
        if (!others && state is { Absent: { } absent, LeftOut: { } leftOut })
        {
            _rows.Restore(absent, leftOut);
            Plan();
            PlanMemory();
            _memory?.Apply(_model);
            _trainer.Together = _memory?.Together ?? 1;
        }

        RunState now = State(0);
        if (!others && (state.Rows, state.DataDigest) != (now.Rows, now.DataDigest))
            throw new InputException(
                $"{folder}: was made with other training rows ({state.Rows:N0} rows), "
                + $"{_arguments.DataPath} "
                + $"has {now.Rows:N0} or other texts: a run goes on only with the same data, or "
                + "with --allow_changes data_path");
        rules.Check(now);
        if (state.Step > _plan.MaxSteps)
            throw new InputException(
                $"{folder}: is at step {state.Step}, beyond the run's {_plan.MaxSteps} steps");
        (_trainer.Optimizer.Updates, _trainer.SkippedInARow) = (state.Updates, state.SkippedInARow);
        return state.Step;
    }
}
